/* The process of a pod's sandbox: it holds the namespaces open, buries orphans, and leaves when told to. */
#include <errno.h>
#include <signal.h>
#include <sys/wait.h>

int main(void) {
    sigset_t waited;
    sigemptyset(&waited);
    sigaddset(&waited, SIGCHLD);
    sigaddset(&waited, SIGTERM);
    sigaddset(&waited, SIGINT);
    if (sigprocmask(SIG_BLOCK, &waited, 0)) return 1;
    for (;;) {
        int seen = 0;
        if (sigwait(&waited, &seen)) return 1;
        if (seen != SIGCHLD) return 0;
        while (waitpid(-1, 0, WNOHANG) > 0) {
        }
    }
}
