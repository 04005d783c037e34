/* A program that launches when it is told to.
 *
 * Each line of standard input is a command; each is answered by a line when all
 * that it asks for was done. A round is one call of each launch function.
 *   main N      N rounds by the first thread
 *   early N     N rounds by each of 4 threads that were there from the start
 *   late N      a thread starts a second and ends, that one a third and ends, and
 *               this one makes N rounds
 *   leave N     an early thread starts a thread and ends, which makes N rounds
 *   child N     N rounds by a child that was forked at the start; answers its pid
 *   fork N      N rounds by a new child
 *   exec N      N rounds by a new child that runs this program anew
 *   spawn N     the same by posix_spawn, which has the memory in common at first
 *   threads N   begins to start N threads, one every 300 us, and answers at once
 *   burst N     N rounds by each of these threads, when all were started */
#define _GNU_SOURCE
#include <pthread.h>
#include <semaphore.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

void cuLaunchKernel(void), cuLaunchKernel_ptsz(void), cuLaunchKernelEx(void),
    cuLaunchKernelEx_ptsz(void), cuLaunchCooperativeKernel(void),
    cuLaunchCooperativeKernel_ptsz(void), cuGraphLaunch(void), cuGraphLaunch_ptsz(void);

extern char **environ;

enum { EARLY = 4 };

static sem_t started, done, early_go[EARLY + 1], burst_go;
static long rounds, burst_threads, depth;
static int to_child[2], from_child[2];

static void launch(long n) {
  for (; n > 0; n--) {
    cuLaunchKernel(), cuLaunchKernel_ptsz(), cuLaunchKernelEx(), cuLaunchKernelEx_ptsz();
    cuLaunchCooperativeKernel(), cuLaunchCooperativeKernel_ptsz();
    cuGraphLaunch(), cuGraphLaunch_ptsz();
  }
}

static void start(void *(*run)(void *), void *argument) {
  pthread_t thread;
  if (pthread_create(&thread, NULL, run, argument) != 0) {
    puts("no thread");
    exit(3);
  }
  pthread_detach(thread);
}

static void *last(void *unused) {
  (void)unused;
  usleep(20000); /* The one that started it has ended. */
  launch(rounds);
  sem_post(&done);
  return NULL;
}

static void *chain(void *unused) {
  (void)unused;
  usleep(20000);
  start(--depth > 0 ? chain : last, NULL);
  return NULL;
}

static void *early(void *go) {
  sem_post(&started);
  for (;;) {
    sem_wait(go);
    if (go == &early_go[EARLY]) {
      start(last, NULL);
      return NULL;
    }
    launch(rounds);
    sem_post(&done);
  }
}

static void *burst(void *unused) {
  (void)unused;
  sem_wait(&burst_go);
  launch(rounds);
  sem_post(&done);
  return NULL;
}

static void *starter(void *unused) {
  (void)unused;
  for (long i = 0; i < burst_threads; i++) {
    start(burst, NULL);
    usleep(300);
  }
  sem_post(&started);
  return NULL;
}

static int wait_for(pid_t child) {
  int status;
  return waitpid(child, &status, 0) == child && status == 0;
}

static void run(const char *self, const char *command, long n) {
  char number[24];
  snprintf(number, sizeof number, "%ld", n);
  char *arguments[] = {(char *)self, number, NULL};
  int fine = 1;
  rounds = n;
  if (!strcmp(command, "main")) {
    launch(n);
  } else if (!strcmp(command, "early")) {
    for (int i = 0; i < EARLY; i++) sem_post(&early_go[i]);
    for (int i = 0; i < EARLY; i++) sem_wait(&done);
  } else if (!strcmp(command, "late")) {
    depth = 2;
    start(chain, NULL);
    sem_wait(&done);
  } else if (!strcmp(command, "leave")) {
    sem_post(&early_go[EARLY]);
    sem_wait(&done);
  } else if (!strcmp(command, "child")) {
    pid_t child;
    fine = write(to_child[1], &n, sizeof n) == sizeof n &&
           read(from_child[0], &child, sizeof child) == sizeof child;
    printf("%d\n", child);
    return;
  } else if (!strcmp(command, "fork")) {
    pid_t child = fork();
    if (child == 0) {
      launch(n);
      _exit(0);
    }
    fine = wait_for(child);
  } else if (!strcmp(command, "exec")) {
    pid_t child = fork();
    if (child == 0) {
      execv(self, arguments);
      _exit(1);
    }
    fine = wait_for(child);
  } else if (!strcmp(command, "spawn")) {
    pid_t child;
    fine = posix_spawn(&child, self, NULL, NULL, arguments, environ) == 0 && wait_for(child);
  } else if (!strcmp(command, "threads")) {
    burst_threads = n;
    start(starter, NULL);
  } else if (!strcmp(command, "burst")) {
    sem_wait(&started);
    for (long i = 0; i < burst_threads; i++) sem_post(&burst_go);
    for (long i = 0; i < burst_threads; i++) sem_wait(&done);
  } else {
    fine = 0;
  }
  puts(fine ? "done" : "failed");
}

int main(int argc, char **argv) {
  if (argc > 1) {
    launch(atol(argv[1]));
    return 0;
  }
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (pipe(to_child) != 0 || pipe(from_child) != 0) return 3;
  if (fork() == 0) {
    long n;
    pid_t self = getpid();
    close(to_child[1]);
    while (read(to_child[0], &n, sizeof n) == sizeof n) {
      launch(n);
      if (write(from_child[1], &self, sizeof self) != sizeof self) break;
    }
    return 0;
  }
  sem_init(&started, 0, 0);
  sem_init(&done, 0, 0);
  sem_init(&burst_go, 0, 0);
  for (int i = 0; i <= EARLY; i++) {
    sem_init(&early_go[i], 0, 0);
    start(early, &early_go[i]);
  }
  for (int i = 0; i <= EARLY; i++) sem_wait(&started);
  puts("ready");
  char command[16];
  long n;
  while (scanf("%15s %ld", command, &n) == 2) run("/proc/self/exe", command, n);
  return 0;
}
