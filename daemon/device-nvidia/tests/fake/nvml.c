/* Stands in for libnvidia-ml.so.1 in tests: four GPUs, each with one trouble.
 *
 * 0 has everything a Hopper has; 1 is in MIG mode and refuses events; 2 is a
 * vGPU that reports little; 3 has fallen off the bus. INIT is what nvmlInit
 * returns. A sample of the performance monitor that outlives the library, or
 * two samples too close to each other, abort the test.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#ifndef INIT
#define INIT 0
#endif

enum { OK = 0, INVALID = 2, UNSUPPORTED = 3, NOT_FOUND = 6, SMALL = 7, TIMEOUT = 10, LOST = 15, UNKNOWN = 999 };

static int gpus[4];
static int samples;
static int waits;

static int index_of(void *device) { return (int)((int *)device - gpus); }

int nvmlInit_v2(void) { return INIT; }

int nvmlShutdown(void)
{
    if (samples)
        abort();
    return OK;
}

int nvmlSystemGetDriverVersion(char *v, unsigned n) { snprintf(v, n, "580.159.04"); return OK; }
int nvmlSystemGetCudaDriverVersion_v2(int *v) { *v = 13000; return OK; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 4; return OK; }

int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d)
{
    if (i > 3)
        return INVALID;
    *d = &gpus[i];
    return OK;
}

int nvmlDeviceGetHandleByUUID(const char *u, void **d)
{
    if (strncmp(u, "GPU-", 4) || u[4] < '0' || u[4] > '3')
        return NOT_FOUND;
    *d = &gpus[u[4] - '0'];
    return OK;
}

int nvmlDeviceGetUUID(void *d, char *u, unsigned n) { snprintf(u, n, "GPU-%d", index_of(d)); return OK; }
int nvmlDeviceGetName(void *d, char *u, unsigned n) { snprintf(u, n, "Test GPU %d", index_of(d)); return OK; }

struct memory { unsigned version; unsigned long long total, reserved, free, used; };

int nvmlDeviceGetMemoryInfo_v2(void *d, struct memory *m)
{
    if (index_of(d) == 3)
        return LOST;
    m->total = 1000;
    m->used = 300 + index_of(d);
    return OK;
}

int nvmlDeviceGetMigMode(void *d, unsigned *now, unsigned *later)
{
    *now = *later = index_of(d) == 1;
    return index_of(d) == 2 ? UNSUPPORTED : OK;
}

int nvmlDeviceGetVirtualizationMode(void *d, unsigned *mode) { *mode = index_of(d) == 2 ? 2 : 0; return OK; }

int nvmlDeviceGetUtilizationRates(void *d, unsigned *rates)
{
    rates[0] = 97;
    rates[1] = 12;
    return index_of(d) == 0 ? OK : UNSUPPORTED;
}

int nvmlDeviceGetPowerUsage(void *d, unsigned *mw) { *mw = 350123; return index_of(d) == 0 ? OK : UNSUPPORTED; }

int nvmlDeviceGetTemperature(void *d, unsigned sensor, unsigned *t)
{
    *t = 41;
    return sensor == 0 && index_of(d) != 3 ? OK : UNSUPPORTED;
}

int nvmlDeviceGetClockInfo(void *d, unsigned type, unsigned *mhz)
{
    *mhz = type == 1 ? 1980 : 2619;
    return index_of(d) == 0 ? OK : UNSUPPORTED;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *d, unsigned long long *r)
{
    *r = 0x4;
    return index_of(d) == 0 ? OK : UNSUPPORTED;
}

struct process { unsigned pid; unsigned long long used; unsigned gi, ci; };

static int list(unsigned *n, struct process *p, const struct process *all, unsigned have)
{
    unsigned room = *n;
    *n = have;
    if (room < have)
        return SMALL;
    memcpy(p, all, have * sizeof *all);
    return OK;
}

/* On GPU 0 this process, whose memory is not told, and one that has ended; on
 * GPU 1 a client of an MPS server. */
int nvmlDeviceGetComputeRunningProcesses_v3(void *d, unsigned *n, struct process *p)
{
    struct process all[2] = {{.pid = 0x7ffffffe, .used = 5}, {.pid = (unsigned)getpid(), .used = -1}};
    if (index_of(d) == 3)
        return LOST;
    return list(n, p, all, index_of(d) == 0 ? 2 : 0);
}

int nvmlDeviceGetMPSComputeRunningProcesses_v3(void *d, unsigned *n, struct process *p)
{
    struct process all[1] = {{.pid = (unsigned)getpid(), .used = 4096}};
    if (index_of(d) == 2)
        return UNSUPPORTED;
    return list(n, p, all, index_of(d) == 1 ? 1 : 0);
}

struct support { unsigned version, supported; };

int nvmlGpmQueryDeviceSupport(void *d, struct support *s) { s->supported = index_of(d) == 0; return OK; }

struct sample { struct timespec at; };

int nvmlGpmSampleAlloc(struct sample **s) { *s = calloc(1, sizeof **s); samples++; return OK; }
int nvmlGpmSampleFree(struct sample *s) { free(s); samples--; return OK; }
int nvmlGpmSampleGet(void *d, struct sample *s) { (void)d; clock_gettime(CLOCK_MONOTONIC, &s->at); return OK; }

struct metric { unsigned id; int result; double value; char *names[3]; };
struct metrics { unsigned version, count; struct sample *first, *second; struct metric metrics[210]; };

int nvmlGpmMetricsGet(struct metrics *m)
{
    double apart = (m->second->at.tv_sec - m->first->at.tv_sec) * 1e3
                 + (m->second->at.tv_nsec - m->first->at.tv_nsec) / 1e6;
    if (apart < 100)
        abort();
    for (unsigned i = 0; i < m->count; i++) {
        struct metric *x = &m->metrics[i];
        switch (x->id) {
        case 2: x->value = 41.5; break;
        case 3: x->value = 20.2; break;
        case 10: x->value = 100.4; break;
        case 20: x->value = 1.5; break;
        case 21: x->value = 2; break;
        default: x->result = UNSUPPORTED;
        }
    }
    return OK;
}

struct event { void *device; unsigned long long type, data; unsigned gi, ci; };

int nvmlEventSetCreate(void **s) { *s = malloc(1); return OK; }
int nvmlEventSetFree(void *s) { free(s); return OK; }

int nvmlDeviceGetSupportedEventTypes(void *d, unsigned long long *types)
{
    *types = index_of(d) < 2 ? 0x18 : 0;
    return index_of(d) == 3 ? LOST : OK;
}

int nvmlDeviceRegisterEvents(void *d, unsigned long long types, void *s)
{
    (void)s;
    return types == 8 && index_of(d) == 0 ? OK : UNKNOWN;
}

int nvmlEventSetWait_v2(void *s, struct event *e, unsigned ms)
{
    (void)s;
    if (waits++ < 2) {
        *e = (struct event){.device = &gpus[0], .type = 8, .data = 13};
        return OK;
    }
    usleep(ms * 1000);
    return TIMEOUT;
}
