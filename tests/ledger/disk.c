// A disk that loses power and fails, under an unchanged program: LD_PRELOAD=disk.so.
//
// Owns what of a folder's files would be on the platters. Calls go through to the real files, so that the program
// reads what it wrote; beside that, each file has an image of what a sync has made durable and a list of what was
// written since. README.md tells the model. Environment:
//   DISK_FOLDER   absolute path; only files directly in it are on this disk
//   DISK_COUNT    file that gets the number of counted calls when the program ends
//   DISK_CRASH    "AT POLICY SEED": at call AT power goes; POLICY is drop, reorder or tear
//   DISK_CONTROL  file read at each call: "sync|write|any ERRNO NAMES" or "stall MILLISECONDS NAMES"; a file is meant
//                 if its name begins with NAMES, and by "*" every file
//   DISK_LIES     a sync says that it is done, and makes nothing durable: what no program can survive
//
// Counted are writes, truncations, syncs and removals. Files that end in -shm are memory, not disk.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { SECTOR = 512, FDS = 4096, FILES = 256 };

// Something that was done to a file and is not durable. Without data: its length was set to `at`.
struct op {
    off_t at;
    size_t length;
    char *data;
    struct op *next;
};

struct file {
    char path[PATH_MAX];
    char *durable;
    size_t length;
    struct op *first, **last;
    int name_durable;  // Its name would be found after a power loss.
    int gone;          // Removed, and the removal is not durable.
};

static struct file files[FILES];
static int file_count;
static int fd_file[FDS];  // Index + 1; -1: the folder itself.
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *folder, *control, *count_path;
static long calls, crash_at;
static char policy[16];
static unsigned long long dice;
static int lies;
static int lost;  // A sync has failed: what it was to make durable never will be.

#define REAL(result, name, ...) \
    static result (*real_##name)(__VA_ARGS__); \
    if (!real_##name) real_##name = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

static void die(const char *why, const char *what) {
    fprintf(stderr, "disk.so: %s: %s\n", why, what);
    _exit(99);
}

static void *need(void *memory) {
    if (!memory) die("no memory", "");
    return memory;
}

__attribute__((constructor)) static void begin(void) {
    folder = getenv("DISK_FOLDER");
    control = getenv("DISK_CONTROL");
    count_path = getenv("DISK_COUNT");
    lies = getenv("DISK_LIES") != NULL;
    const char *crash = getenv("DISK_CRASH");
    if (crash && sscanf(crash, "%ld %15s %llu", &crash_at, policy, &dice) != 3) die("DISK_CRASH", crash);
}

static unsigned roll(void) {  // SplitMix64
    unsigned long long x = dice += 0x9e3779b97f4a7c15ULL;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return (unsigned)((x ^ (x >> 31)) >> 33);
}

// The name within the folder; null for what is not on this disk.
static const char *name_of(const char *path) {
    size_t length = folder ? strlen(folder) : 0;
    if (!length || strncmp(path, folder, length) || path[length] != '/') return NULL;
    const char *name = path + length + 1;
    size_t end = strlen(name);
    if (!end || strchr(name, '/') || (end > 4 && !strcmp(name + end - 4, "-shm"))) return NULL;
    return name;
}

static void apply(struct file *f, off_t at, const char *data, size_t length) {
    size_t end = data ? (size_t)at + length : (size_t)at;
    if (!data || end > f->length) {
        f->durable = need(realloc(f->durable, end + 1));
        if (end > f->length) memset(f->durable + f->length, 0, end - f->length);
        f->length = end;
    }
    if (data) memcpy(f->durable + at, data, length);
}

static void forget(struct file *f, int durable) {
    for (struct op *op = f->first, *next; op; op = next) {
        next = op->next;
        if (durable) apply(f, op->at, op->data, op->length);
        free(op->data);
        free(op);
    }
    f->first = NULL;
    f->last = &f->first;
}

static void record(struct file *f, off_t at, const char *data, size_t length) {
    struct op *op = need(calloc(1, sizeof *op));
    op->at = at;
    op->length = length;
    if (data) memcpy(op->data = need(malloc(length + 1)), data, length);
    *f->last = op;
    f->last = &op->next;
}

static struct file *find(const char *path) {
    for (int i = 0; i < file_count; i++)
        if (!files[i].gone && !strcmp(files[i].path, path)) return &files[i];
    return NULL;
}

static struct file *add(const char *path, int existed) {
    if (file_count == FILES) die("too many files", path);
    struct file *f = &files[file_count++];
    snprintf(f->path, sizeof f->path, "%s", path);
    f->last = &f->first;
    f->name_durable = existed;
    return f;
}

// What is there at the first look counts as durable.
static void load(struct file *f) {
    REAL(FILE *, fopen, const char *, const char *);
    FILE *stream = real_fopen(f->path, "r");
    if (!stream) return;
    char chunk[1 << 16];
    size_t got;
    while ((got = fread(chunk, 1, sizeof chunk, stream)) > 0) apply(f, (off_t)f->length, chunk, got);
    fclose(stream);
}

static void store(const struct file *f) {
    REAL(FILE *, fopen, const char *, const char *);
    FILE *stream = real_fopen(f->path, "w");
    if (!stream || fwrite(f->durable, 1, f->length, stream) != f->length || fclose(stream)) die("cannot write", f->path);
}

// Some of what was not durable has reached the disk all the same.
static void survive(struct file *f) {
    if (!strcmp(policy, "tear")) {
        for (struct op *op = f->first; op; op = op->next) {
            if (!op->data) {
                if (roll() % 2) apply(f, op->at, NULL, 0);
                continue;
            }
            for (size_t from = 0; from < op->length;) {
                size_t upto = from + SECTOR - ((size_t)op->at + from) % SECTOR;
                if (upto > op->length) upto = op->length;
                if (roll() % 2) apply(f, op->at + (off_t)from, op->data + from, upto - from);
                from = upto;
            }
        }
    } else if (!strcmp(policy, "reorder")) {
        struct op *list[1 << 14];
        int count = 0;
        for (struct op *op = f->first; op && count < 1 << 14; op = op->next)
            if (roll() % 4) list[count++] = op;
        for (int i = count - 1; i > 0; i--) {
            int j = (int)(roll() % (unsigned)(i + 1));
            struct op *other = list[i];
            list[i] = list[j];
            list[j] = other;
        }
        for (int i = 0; i < count; i++) apply(f, list[i]->at, list[i]->data, list[i]->length);
    }
}

// Makes the real files what a power loss leaves of them.
static void power_off(void) {
    int drop = !strcmp(policy, "drop");
    REAL(int, unlink, const char *);
    for (int i = 0; i < file_count; i++) {
        struct file *f = &files[i];
        survive(f);
        // A removal that did not last brings the file back, unless another has its name by now.
        if (f->gone && (!f->name_durable || find(f->path) || (!drop && roll() % 2))) continue;
        if (!f->gone && !f->name_durable && (drop || roll() % 2)) {
            real_unlink(f->path);
            continue;
        }
        store(f);
    }
}

static void report(void) {
    if (!count_path) return;
    REAL(FILE *, fopen, const char *, const char *);
    FILE *stream = real_fopen(count_path, "w");
    if (stream) fprintf(stream, "%ld\n", calls), fclose(stream);
}

__attribute__((destructor)) static void end(void) {
    pthread_mutex_lock(&lock);
    report();
    // The cache goes with the machine that was stopped because of the failed sync.
    if (lost) {
        snprintf(policy, sizeof policy, "drop");
        power_off();
    }
    folder = NULL;
    pthread_mutex_unlock(&lock);
}

static int error_of(const char *name) {
    return !strcmp(name, "EIO") ? EIO : !strcmp(name, "ENOSPC") ? ENOSPC : !strcmp(name, "EROFS") ? EROFS : 0;
}

// What the control file wants of a call on a file: an errno, or 0. May take its time.
static int fault(const char *name, int is_sync) {
    if (!control) return 0;
    REAL(FILE *, fopen, const char *, const char *);
    FILE *stream = real_fopen(control, "r");
    if (!stream) return 0;
    char which[16] = "", what[16] = "", names[64] = "";
    int words = fscanf(stream, "%15s %15s %63s", which, what, names);
    fclose(stream);
    if (words != 3 || (strcmp(names, "*") && strncmp(name ? name : "", names, strlen(names)))) return 0;
    if (!strcmp(which, "stall")) {
        long ms = atol(what);
        struct timespec time = {ms / 1000, ms % 1000 * 1000000};
        nanosleep(&time, NULL);
        return 0;
    }
    return !strcmp(which, "any") || !strcmp(which, is_sync ? "sync" : "write") ? error_of(what) : 0;
}

// The call is counted. At the chosen one power goes, whatever the call would have done.
static void tick(void) {
    if (++calls != crash_at) return;
    report();
    power_off();
    kill(getpid(), SIGKILL);
    pause();
}

static struct file *file_of(int fd) {
    return fd >= 0 && fd < FDS && fd_file[fd] > 0 ? &files[fd_file[fd] - 1] : NULL;
}

static int opened(int fd, const char *path, int flags, int existed) {
    if (fd < 0) return fd;
    if (fd >= FDS) die("too many descriptors", path);
    if (!name_of(path)) {
        fd_file[fd] = -1;
        return fd;
    }
    struct file *f = find(path);
    if (!f) load(f = add(path, existed));
    if (flags & O_TRUNC) record(f, 0, NULL, 0);
    fd_file[fd] = (int)(f - files) + 1;
    return fd;
}

static int open_any(int at, const char *path, int flags, mode_t mode) {
    REAL(int, openat, int, const char *, int, ...);
    if (!folder || (strcmp(path, folder) && !name_of(path))) return real_openat(at, path, flags, mode);
    pthread_mutex_lock(&lock);
    int existed = access(path, F_OK) == 0;
    int error = name_of(path) && (flags & (O_WRONLY | O_RDWR)) && !existed ? fault(name_of(path), 0) : 0;
    int fd = error ? (errno = error, -1) : opened(real_openat(at, path, flags, mode), path, flags, existed);
    pthread_mutex_unlock(&lock);
    return fd;
}

static mode_t mode_of(int flags, va_list *list) {
    return flags & (O_CREAT | O_TMPFILE) ? (mode_t)va_arg(*list, int) : 0;
}

#define OPEN(name, at, ...) \
    int name(__VA_ARGS__, const char *path, int flags, ...) { \
        va_list list; \
        va_start(list, flags); \
        mode_t mode = mode_of(flags, &list); \
        va_end(list); \
        return open_any(at, path, flags, mode); \
    }
OPEN(openat, dir, int dir)
OPEN(openat64, dir, int dir)
#undef OPEN
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list list; \
        va_start(list, flags); \
        mode_t mode = mode_of(flags, &list); \
        va_end(list); \
        return open_any(AT_FDCWD, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

int close(int fd) {
    REAL(int, close, int);
    // Others, sockets above all, must not wait for a disk that stalls.
    if (folder && fd >= 0 && fd < FDS && fd_file[fd]) {
        pthread_mutex_lock(&lock);
        fd_file[fd] = 0;
        pthread_mutex_unlock(&lock);
    }
    return real_close(fd);
}

static ssize_t write_at(int fd, const void *data, size_t length, off_t at, int moves) {
    REAL(ssize_t, pwrite64, int, const void *, size_t, off_t);
    REAL(ssize_t, write, int, const void *, size_t);
    struct file *f = folder ? file_of(fd) : NULL;
    if (!f) return moves ? real_write(fd, data, length) : real_pwrite64(fd, data, length, at);
    pthread_mutex_lock(&lock);
    int error = fault(name_of(f->path), 0);
    ssize_t done = -1;
    if (error) {
        errno = error;
    } else {
        off_t place = moves ? lseek(fd, 0, SEEK_CUR) : at;
        record(f, place, data, length);
        tick();
        done = moves ? real_write(fd, data, length) : real_pwrite64(fd, data, length, at);
        if (done != (ssize_t)length) die("a short write, which is not modelled", f->path);
    }
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t write(int fd, const void *data, size_t length) { return write_at(fd, data, length, 0, 1); }
ssize_t pwrite(int fd, const void *data, size_t length, off_t at) { return write_at(fd, data, length, at, 0); }
ssize_t pwrite64(int fd, const void *data, size_t length, off_t at) { return write_at(fd, data, length, at, 0); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    if (folder && file_of(fd)) die("writev is not modelled", "");
    return real_writev(fd, parts, count);
}

static int truncate_to(int fd, off_t length) {
    REAL(int, ftruncate64, int, off_t);
    struct file *f = folder ? file_of(fd) : NULL;
    if (!f) return real_ftruncate64(fd, length);
    pthread_mutex_lock(&lock);
    int error = fault(name_of(f->path), 0), done = -1;
    if (error) {
        errno = error;
    } else {
        record(f, length, NULL, 0);
        tick();
        done = real_ftruncate64(fd, length);
    }
    pthread_mutex_unlock(&lock);
    return done;
}

int ftruncate(int fd, off_t length) { return truncate_to(fd, length); }
int ftruncate64(int fd, off_t length) { return truncate_to(fd, length); }

static void synced_folder(void) {
    for (int i = 0; i < file_count; i++) {
        files[i].name_durable = !files[i].gone;
        // A removal that lasts: nothing of the file will come back.
        if (files[i].gone) forget(&files[i], 0);
    }
}

static int sync_fd(int fd) {
    REAL(int, fsync, int);
    struct file *f = folder ? file_of(fd) : NULL;
    int is_folder = folder && fd >= 0 && fd < FDS && fd_file[fd] == -1;
    if (!f && !is_folder) return real_fsync(fd);
    pthread_mutex_lock(&lock);
    int error = fault(f ? name_of(f->path) : NULL, 1);
    if (error) {
        // As Linux: the pages are marked clean, and a second sync would succeed without them.
        if (f) forget(f, 0);
        lost = 1;
        errno = error;
    } else {
        tick();
        if (lies) {}
        else if (f) forget(f, 1);
        else synced_folder();
    }
    pthread_mutex_unlock(&lock);
    // The true disk is not waited for: this one decides what lasts.
    return error ? -1 : 0;
}

int fsync(int fd) { return sync_fd(fd); }
int fdatasync(int fd) { return sync_fd(fd); }

int unlink(const char *path) {
    REAL(int, unlink, const char *);
    if (!folder || !name_of(path)) return real_unlink(path);
    pthread_mutex_lock(&lock);
    int error = fault(name_of(path), 0), done = -1;
    if (error) {
        errno = error;
    } else {
        tick();
        struct file *f = find(path);
        if (!f && access(path, F_OK) == 0) load(f = add(path, 1));
        done = real_unlink(path);
        if (f && done == 0) f->gone = 1;
    }
    pthread_mutex_unlock(&lock);
    return done;
}

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    if (folder && (name_of(from) || name_of(to))) die("rename is not modelled", from);
    return real_rename(from, to);
}
