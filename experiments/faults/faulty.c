/* Lets one operation on files fail. Loaded before libc (LD_PRELOAD); armed by fault_arm().

   Operations on paths below a folder are counted by kind and path, so that the order in which
   threads come does not matter: numbers in names that differ from run to run read as '*'. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, NOSPACE, BROKEN, KILLED, SHORT };

static char root[PATH_MAX], wanted[PATH_MAX + 64], graves[PATH_MAX];
static int log_to = -1, kind = NONE, nth;
static __thread int within;

/* What a command shares with its jobs, which are forks of the same server. */
static struct {
    pthread_mutex_t lock;
    int count, seen, is_full;
    pid_t command;
} *shared;

__attribute__((constructor)) static void share(void) {
    int flags = MAP_SHARED | MAP_ANONYMOUS;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (shared == MAP_FAILED) abort();
}

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, #name))

/* Begins: operations below `folder` go to `log`; the `number`-th that is called `name` fails.
   A job joins its command: they count together, and are killed together. */
void fault_arm(const char *folder, const char *log, const char *grave, const char *name,
               int number, int how, int joins) {
    strncpy(root, folder, sizeof root - 1);
    strncpy(wanted, name, sizeof wanted - 1);
    strncpy(graves, grave, sizeof graves - 1);
    nth = number;
    if (!joins) {
        pthread_mutexattr_t between;
        memset(shared, 0, sizeof *shared);
        pthread_mutexattr_init(&between);
        pthread_mutexattr_setpshared(&between, PTHREAD_PROCESS_SHARED);
        pthread_mutex_init(&shared->lock, &between); /* a kill may have left it locked */
        shared->command = getpid();
    }
    within = 1;
    log_to = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    within = 0;
    kind = how;
}

static void kill_all(void) {
    if (shared->command != getpid()) kill(shared->command, SIGKILL);
    raise(SIGKILL);
}

static void tell(const char *text) {
    ssize_t (*real)(int, const void *, size_t) =
        REAL(write, ssize_t(*)(int, const void *, size_t));
    if (real(log_to, text, strlen(text)) < 0) abort();
}

static int is_below(const char *path) {
    size_t length = strlen(root);
    return length && strncmp(path, root, length) == 0 && (path[length] == '/' || !path[length]);
}

static int absolute(int dir, const char *path, char *into) {
    char from[PATH_MAX / 2];
    if (path[0] == '/') {
        snprintf(into, PATH_MAX, "%s", path);
    } else if (dir == AT_FDCWD) {
        if (getcwd(from, sizeof from) == NULL) return 0;
        snprintf(into, PATH_MAX, "%s/%s", from, path);
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t length = readlink(link, from, sizeof from - 1);
        if (length < 0) return 0;
        from[length] = 0;
        snprintf(into, PATH_MAX, "%s/%s", from, path);
    }
    return is_below(into);
}

static int of_file(int file, char *into) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, into, PATH_MAX - 1);
    if (length < 0) return 0;
    into[length] = 0;
    return is_below(into);
}

/* A name that is the same in every run: of what chance or the clock gives, '*' is left. */
static void plain(const char *path, char *into) {
    static const char *by_chance[] = {"/events.out.", "/tmp", "/.tmp", "/.rows-", "/.writable-"};
    const char *at = path + strlen(root);
    while (*at) {
        size_t hex = strspn(at, "0123456789abcdef");
        const char *name = NULL;
        for (size_t i = 0; i < sizeof by_chance / sizeof *by_chance; i++)
            if (strncmp(at, by_chance[i], strlen(by_chance[i])) == 0) name = by_chance[i];
        if (name) {
            into += sprintf(into, "%s*", name);
            while (*++at && *at != '/') continue;
        } else if (hex >= 8) {
            *into++ = '*';
            at += hex;
        } else {
            *into++ = *at++;
        }
    }
    *into = 0;
}

/* Counts an operation; its number in the log, or, where it is to fail, -1 with errno set. */
static int begin(const char *what, const char *path, const char *other, int file) {
    char line[6 * PATH_MAX], called[3 * PATH_MAX], name[PATH_MAX], target[PATH_MAX] = "";
    struct stat found = {0};
    int failing = 0, is_write = strcmp(what, "write") == 0;
    if (file >= 0) fstat(file, &found);
    plain(path, name);
    if (other) plain(other, target);
    snprintf(called, sizeof called, "%s %s%s%s", what, name, other ? " " : "", target);
    pthread_mutex_lock(&shared->lock);
    int number = ++shared->count;
    if (kind != NONE && strcmp(called, wanted) == 0 && ++shared->seen == nth) failing = 1;
    snprintf(line, sizeof line, "%d\t%s\t%s\t%s\t%s\t%lu\t%ld\n", number, called, what, path,
             other ? other : "", (unsigned long)found.st_ino, (long)found.st_size);
    if (failing && kind == KILLED && !is_write) kill_all();
    tell(line);
    if (failing && kind == NOSPACE) shared->is_full = 1;
    pthread_mutex_unlock(&shared->lock);
    if (failing && kind == KILLED) return -2;
    if (failing && kind == SHORT) return -2;
    if (failing && kind == BROKEN) return errno = EIO, -1;
    int takes_space = strcmp(what, "unlink") && strcmp(what, "rmdir") && strcmp(what, "rename");
    if (shared->is_full && takes_space) return errno = ENOSPC, -1;
    return number;
}

static void keep(int number, int dir, const char *path) {
    char grave[PATH_MAX + 32];
    if (!graves[0] || number < 0) return;
    snprintf(grave, sizeof grave, "%s/%d", graves, number);
    if (linkat(dir, path, AT_FDCWD, grave, 0) != 0) errno = 0;
}

/* What writes. */

static ssize_t part(int number, size_t count) {
    return number == -2 && count > 1 ? (ssize_t)(count / 2) : (ssize_t)count;
}

static void end(int number) {
    if (number == -2 && kind == KILLED) kill_all();
}

#define WRITES(call, declared, given, counted)                                                   \
    ssize_t call declared {                                                                      \
        ssize_t(*real) declared = REAL(call, ssize_t(*) declared);                               \
        char path[PATH_MAX];                                                                     \
        if (within || log_to < 0 || file == log_to || !of_file(file, path)) return real given;   \
        int number = begin("write", path, NULL, file);                                              \
        if (number == -1) return -1;                                                             \
        counted = part(number, counted);                                                         \
        ssize_t done = real given;                                                               \
        end(number);                                                                             \
        return done;                                                                             \
    }

WRITES(write, (int file, const void *from, size_t count), (file, from, count), count)
WRITES(pwrite, (int file, const void *from, size_t count, off_t at), (file, from, count, at), count)
WRITES(pwrite64, (int file, const void *from, size_t count, off64_t at), (file, from, count, at),
       count)
WRITES(sendfile, (int file, int from, off_t *at, size_t count), (file, from, at, count), count)
WRITES(sendfile64, (int file, int from, off64_t *at, size_t count), (file, from, at, count), count)

ssize_t writev(int file, const struct iovec *from, int count) {
    ssize_t (*real)(int, const struct iovec *, int) =
        REAL(writev, ssize_t(*)(int, const struct iovec *, int));
    char path[PATH_MAX];
    if (within || log_to < 0 || file == log_to || !of_file(file, path))
        return real(file, from, count);
    int number = begin("write", path, NULL, file);
    if (number == -1) return -1;
    ssize_t done = real(file, from, number == -2 && count > 1 ? count / 2 : count);
    end(number);
    return done;
}

int fsync(int file) {
    int (*real)(int) = REAL(fsync, int (*)(int));
    char path[PATH_MAX];
    if (within || log_to < 0 || !of_file(file, path)) return real(file);
    return begin("sync", path, NULL, file) == -1 ? -1 : 0; /* the test's disk need not turn */
}

int fdatasync(int file) { return fsync(file); }

int ftruncate64(int file, off64_t length) {
    int (*real)(int, off64_t) = REAL(ftruncate64, int (*)(int, off64_t));
    char path[PATH_MAX];
    if (!within && log_to >= 0 && of_file(file, path) && begin("cut", path, NULL, file) == -1)
        return -1;
    return real(file, length);
}

int ftruncate(int file, off_t length) { return ftruncate64(file, length); }

/* What makes, moves and removes names. */

static int opened(int dir, const char *path, int flags, mode_t mode) {
    int (*real)(int, const char *, int, ...) = REAL(openat64, int (*)(int, const char *, int, ...));
    char full[PATH_MAX];
    int writes = (flags & O_ACCMODE) != O_RDONLY;
    if (within || log_to < 0 || !writes || !absolute(dir, path, full))
        return real(dir, path, flags, mode);
    struct stat found;
    int is_new = fstatat(dir, path, &found, AT_SYMLINK_NOFOLLOW) != 0;
    const char *what = is_new ? "create" : flags & O_TRUNC ? "truncate" : "open";
    int number = begin(what, full, NULL, -1);
    return number == -1 ? -1 : real(dir, path, flags, mode);
}

#define OPENS(call, declared, dir)                                                                \
    int call declared {                                                                           \
        mode_t mode = 0;                                                                          \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                      \
            va_list more;                                                                         \
            va_start(more, flags);                                                                \
            mode = va_arg(more, mode_t);                                                          \
            va_end(more);                                                                         \
        }                                                                                         \
        return opened(dir, path, flags, mode);                                                    \
    }

OPENS(open, (const char *path, int flags, ...), AT_FDCWD)
OPENS(open64, (const char *path, int flags, ...), AT_FDCWD)
OPENS(openat, (int dir, const char *path, int flags, ...), dir)
OPENS(openat64, (int dir, const char *path, int flags, ...), dir)

FILE *fopen64(const char *path, const char *mode) {
    FILE *(*real)(const char *, const char *) = REAL(fopen64, FILE * (*)(const char *, const char *));
    char full[PATH_MAX];
    struct stat found;
    if (!within && log_to >= 0 && mode[0] != 'r' && absolute(AT_FDCWD, path, full)) {
        const char *what = lstat(path, &found) != 0 ? "create" : mode[0] == 'w' ? "truncate" : "open";
        if (begin(what, full, NULL, -1) == -1) return NULL;
    }
    return real(path, mode);
}

FILE *fopen(const char *path, const char *mode) { return fopen64(path, mode); }

static int renamed(int dir, const char *from, int to_dir, const char *to, unsigned flags) {
    int (*real)(int, const char *, int, const char *, unsigned) =
        REAL(renameat2, int (*)(int, const char *, int, const char *, unsigned));
    char one[PATH_MAX], other[PATH_MAX];
    if (within || log_to < 0 || !absolute(dir, from, one) || !absolute(to_dir, to, other))
        return real(dir, from, to_dir, to, flags);
    int number = begin(flags ? "exchange" : "rename", one, other, -1);
    if (number == -1) return -1;
    if (!flags) keep(number, to_dir, to);
    return real(dir, from, to_dir, to, flags);
}

int rename(const char *from, const char *to) { return renamed(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int dir, const char *from, int to_dir, const char *to) {
    return renamed(dir, from, to_dir, to, 0);
}
int renameat2(int dir, const char *from, int to_dir, const char *to, unsigned flags) {
    return renamed(dir, from, to_dir, to, flags);
}

int mkdirat(int dir, const char *path, mode_t mode) {
    int (*real)(int, const char *, mode_t) = REAL(mkdirat, int (*)(int, const char *, mode_t));
    char full[PATH_MAX];
    struct stat found;
    if (!within && log_to >= 0 && absolute(dir, path, full) &&
        fstatat(dir, path, &found, AT_SYMLINK_NOFOLLOW) != 0 && begin("mkdir", full, NULL, -1) == -1)
        return -1;
    return real(dir, path, mode);
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int unlinkat(int dir, const char *path, int flags) {
    int (*real)(int, const char *, int) = REAL(unlinkat, int (*)(int, const char *, int));
    char full[PATH_MAX];
    struct stat found;
    if (!within && log_to >= 0 && absolute(dir, path, full) &&
        fstatat(dir, path, &found, AT_SYMLINK_NOFOLLOW) == 0) {
        int number = begin(flags & AT_REMOVEDIR ? "rmdir" : "unlink", full, NULL, -1);
        if (number == -1) return -1;
        if (!(flags & AT_REMOVEDIR)) keep(number, dir, path);
    }
    return real(dir, path, flags);
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char *path) {
    struct stat found;
    return unlinkat(AT_FDCWD, path,
                    lstat(path, &found) == 0 && S_ISDIR(found.st_mode) ? AT_REMOVEDIR : 0);
}
