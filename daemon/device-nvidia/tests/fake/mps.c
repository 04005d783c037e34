/* Stands in for nvidia-cuda-mps-control and nvidia-cuda-mps-server in tests.
 *
 * "-f" listens on a unix socket in CUDA_MPS_PIPE_DIRECTORY; without arguments
 * it hands its input to that socket and prints the answer. Under the server's
 * name it waits until it is ended. A file "broken" beside the program makes the
 * daemon fail at its start. "client" and "deafen" are for the tests alone.
 */
#include <libgen.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static struct sockaddr_un address(void)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path, sizeof a.sun_path, "%s/control", getenv("CUDA_MPS_PIPE_DIRECTORY"));
    return a;
}

static int client(void)
{
    struct sockaddr_un a = address();
    char text[256];
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    ssize_t n = read(0, text, sizeof text);
    if (connect(s, (struct sockaddr *)&a, sizeof a) || n < 0 || write(s, text, n) != n) {
        puts("Cannot find MPS control daemon process");
        return 1;
    }
    while ((n = read(s, text, sizeof text)) > 0)
        if (write(1, text, n) != n)
            return 1;
    return 0;
}

static void write_file(const char *name, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", getenv("CUDA_MPS_PIPE_DIRECTORY"), name);
    FILE *f = fopen(path, "w");
    if (!f || fputs(text, f) < 0 || fclose(f))
        exit(4);
}

static int daemon_main(const char *self)
{
    struct sockaddr_un a = address();
    char path[4200], text[256];
    int deaf = 0;
    pid_t server = 0;

    snprintf(path, sizeof path, "%s/broken", self);
    if (!access(path, F_OK)) {
        fputs("no usable device\n", stderr);
        return 3;
    }
    umask(077);
    snprintf(path, sizeof path, "%s/log", getenv("CUDA_MPS_PIPE_DIRECTORY"));
    int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (mkfifo(path, 0600) || bind(s, (struct sockaddr *)&a, sizeof a) || listen(s, 8))
        return 4;
    write_file("devices", getenv("CUDA_VISIBLE_DEVICES"));
    for (;;) {
        int c = accept(s, NULL, NULL);
        ssize_t n = read(c, text, sizeof text - 1);
        text[n > 0 ? n : 0] = 0;
        if (deaf) {
            /* Keeps the connection open, so the helper waits for an answer. */
            continue;
        }
        if (!strncmp(text, "quit", 4)) {
            if (server) {
                kill(server, SIGTERM);
                waitpid(server, NULL, 0);
            }
            return 0;
        }
        if (!strncmp(text, "deafen", 6)) {
            deaf = 1;
            signal(SIGTERM, SIG_IGN);
        }
        if (!strncmp(text, "client", 6) && !(server = fork())) {
            snprintf(path, sizeof path, "%s/nvidia-cuda-mps-server", self);
            close(c);
            execl(path, path, (char *)NULL);
            _exit(5);
        }
        close(c);
    }
}

int main(int argc, char **argv)
{
    char exe[4096];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    if (n < 0)
        return 4;
    exe[n] = 0;
    if (strstr(exe, "nvidia-cuda-mps-server"))
        for (;;)
            pause();
    if (argc > 1 && !strcmp(argv[1], "-f"))
        return daemon_main(dirname(exe));
    return client();
}
