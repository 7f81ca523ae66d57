/* Faults on demand in the file calls of one process, which loads this library with LD_PRELOAD.

   PERTA_FAULT_PATH    a call counts only if the path of its file contains this text
   PERTA_FAULT_KINDS   kinds of calls that count, separated by commas (see the calls below)
   PERTA_FAULT_THEN    nothing, short, torn, kill before, kill after, or the number of an error
   PERTA_FAULT_AT      ordinal of the counted call that has the fault, from 0
   PERTA_FAULT_LASTING 1: every later call has it too
   PERTA_FAULT_LOG     file to which each counted call is added before it is made

   If a process has loaded the library without these variables, a fork of it can set them and call read_plan. Children
   of the process have no faults. Linux, glibc, 64 bits. Calls inside glibc (stdio) and accesses to mapped pages do not
   come here. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <unistd.h>

_Static_assert(sizeof(off_t) == sizeof(off64_t), "a call and its 64-bit twin are one function here");

enum { PATH = 2 * PATH_MAX, LINE = 2 * PATH + 64 };

typedef enum { NOTHING, FAIL, SHORT, TORN, KILL_BEFORE, KILL_AFTER } Fault;

static struct {
  pid_t process;  // 0: count nothing
  const char* path;
  const char* kinds;
  Fault then;
  int error;
  long at;
  int lasting;
  int log;
} plan;
static pthread_mutex_t counting = PTHREAD_MUTEX_INITIALIZER;  // keeps the log in the order of the ordinals
static long counted;

static const char* setting(const char* name) {
  const char* value = getenv(name);
  return value ? strdup(value) : NULL;
}

static Fault fault_named(const char* name) {
  if (!strcmp(name, "nothing")) return NOTHING;
  if (!strcmp(name, "short")) return SHORT;
  if (!strcmp(name, "torn")) return TORN;
  if (!strcmp(name, "kill before")) return KILL_BEFORE;
  if (!strcmp(name, "kill after")) return KILL_AFTER;
  return FAIL;
}

__attribute__((constructor)) void read_plan(void) {
  plan.path = setting("PERTA_FAULT_PATH");
  plan.kinds = setting("PERTA_FAULT_KINDS");
  const char* then = setting("PERTA_FAULT_THEN");
  const char* at = setting("PERTA_FAULT_AT");
  const char* lasting = setting("PERTA_FAULT_LASTING");
  const char* log = setting("PERTA_FAULT_LOG");
  if (!plan.path || !plan.kinds || !then || !at || !lasting) return;
  plan.then = fault_named(then);
  plan.error = atoi(then);
  plan.at = atol(at);
  plan.lasting = atoi(lasting);
  plan.log = log ? open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666) : -1;
  if (log && plan.log < 0) abort();
  unsetenv("LD_PRELOAD");
  plan.process = getpid();
}

// `real`: glibc's definition of a function, the next one after that of this library.
#define REAL(function) \
  static _Atomic(__typeof__(&function)) next; \
  if (!next) next = (__typeof__(&function))dlsym(RTLD_NEXT, #function); \
  __typeof__(&function) real = next

// Paths

static void path_of(int descriptor, char path[PATH]) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, PATH - 1);
  path[length < 0 ? 0 : length] = 0;
}

static void path_from(int directory, const char* name, char path[PATH]) {
  path[0] = 0;
  if (name[0] != '/') {
    if (directory != AT_FDCWD)
      path_of(directory, path);
    else if (!getcwd(path, PATH_MAX))
      path[0] = 0;
    strcat(path, "/");
  }
  strncat(path, name, PATH_MAX);
}

// The fault of this call

static int listed(const char* kind) {
  size_t length = strlen(kind);
  for (const char* rest = plan.kinds; (rest = strstr(rest, kind)); rest += length) {
    int begins = rest == plan.kinds || rest[-1] == ',';
    if (begins && (rest[length] == ',' || !rest[length])) return 1;
  }
  return 0;
}

static void log_call(const char* kind, size_t size, const char* path, const char* target) {
  char line[LINE];
  int length = snprintf(line, sizeof line, "%s\t%zu\t%s\t%s", kind, size, path, target);
  REAL(write);
  if (real(plan.log, line, length + 1) != length + 1) abort();  // with the 0 at its end
}

static int active(const char* kind) { return plan.process == getpid() && listed(kind); }

static Fault count_call(const char* kind, size_t size, const char* path, const char* target) {
  if (!strstr(path, plan.path) && !strstr(target, plan.path)) return NOTHING;
  pthread_mutex_lock(&counting);
  long number = counted++;
  if (plan.log >= 0) log_call(kind, size, path, target);
  pthread_mutex_unlock(&counting);
  return number == plan.at || (plan.lasting && number > plan.at) ? plan.then : NOTHING;
}

static Fault on_descriptor(const char* kind, size_t size, int descriptor) {
  if (!active(kind)) return NOTHING;
  char path[PATH];
  path_of(descriptor, path);
  return count_call(kind, size, path, "");
}

static Fault on_descriptors(const char* kind, size_t size, int source, int target) {
  if (!active(kind)) return NOTHING;
  char from[PATH], to[PATH];
  path_of(source, from);
  path_of(target, to);
  return count_call(kind, size, from, to);
}

static Fault on_name(const char* kind, size_t size, int directory, const char* name) {
  if (!active(kind)) return NOTHING;
  char path[PATH];
  path_from(directory, name, path);
  return count_call(kind, size, path, "");
}

static Fault on_names(const char* kind, int directory, const char* name, int to_directory, const char* to_name) {
  if (!active(kind)) return NOTHING;
  char from[PATH], to[PATH];
  path_from(directory, name, from);
  path_from(to_directory, to_name, to);
  return count_call(kind, 0, from, to);
}

// The fault, before and after the call

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

// False if the call must fail instead of being made.
static int may_begin(Fault fault) {
  if (fault == KILL_BEFORE) die();
  if (fault == FAIL) errno = plan.error;
  return fault != FAIL;
}

// How many of `size` bytes the call may take. A short call takes at least one, so that a loop of them ends.
static size_t allowed(Fault fault, size_t size) {
  if (fault == SHORT) return size - size / 2;
  return fault == TORN ? size / 2 : size;
}

static void end_call(Fault fault) {
  if (fault == TORN || fault == KILL_AFTER) die();
}

// Makes the call `real` with the fault `injected`, a name that the arguments can use.
#define CALL(type, fault, ...) \
  Fault injected = fault; \
  if (!may_begin(injected)) return -1; \
  type result = real(__VA_ARGS__); \
  end_call(injected); \
  return result

// The calls, by kind

#define TWIN(type, twin, function, ...) type twin(__VA_ARGS__) __attribute__((alias(#function)))

ssize_t write(int file, const void* data, size_t size) {
  REAL(write);
  CALL(ssize_t, on_descriptor("write", size, file), file, data, allowed(injected, size));
}

ssize_t pwrite(int file, const void* data, size_t size, off_t offset) {
  REAL(pwrite);
  CALL(ssize_t, on_descriptor("write", size, file), file, data, allowed(injected, size), offset);
}
TWIN(ssize_t, pwrite64, pwrite, int, const void*, size_t, off64_t);

ssize_t read(int file, void* data, size_t size) {
  REAL(read);
  CALL(ssize_t, on_descriptor("read", size, file), file, data, allowed(injected, size));
}

ssize_t pread(int file, void* data, size_t size, off_t offset) {
  REAL(pread);
  CALL(ssize_t, on_descriptor("read", size, file), file, data, allowed(injected, size), offset);
}
TWIN(ssize_t, pread64, pread, int, void*, size_t, off64_t);

static size_t total(const struct iovec* buffers, int count) {
  size_t size = 0;
  for (int k = 0; k < count; ++k) size += buffers[k].iov_len;
  return size;
}

// The first `size` bytes of the buffers.
static void cut(struct iovec* kept, const struct iovec* buffers, int count, size_t size) {
  for (int k = 0; k < count; ++k) {
    kept[k] = buffers[k];
    if (kept[k].iov_len > size) kept[k].iov_len = size;
    size -= kept[k].iov_len;
  }
}

// The same for a call with `count` buffers on `file`; its further arguments follow.
#define CALL_BUFFERS(kind, ...) \
  if (count < 0 || count > IOV_MAX) return errno = EINVAL, -1; \
  size_t size = total(buffers, count); \
  struct iovec kept[IOV_MAX]; \
  Fault fault = on_descriptor(kind, size, file); \
  cut(kept, buffers, count, allowed(fault, size)); \
  CALL(ssize_t, fault, file, kept, count __VA_OPT__(, ) __VA_ARGS__)

ssize_t writev(int file, const struct iovec* buffers, int count) {
  REAL(writev);
  CALL_BUFFERS("write");
}

ssize_t pwritev(int file, const struct iovec* buffers, int count, off_t offset) {
  REAL(pwritev);
  CALL_BUFFERS("write", offset);
}
TWIN(ssize_t, pwritev64, pwritev, int, const struct iovec*, int, off64_t);

ssize_t pwritev2(int file, const struct iovec* buffers, int count, off_t offset, int flags) {
  REAL(pwritev2);
  CALL_BUFFERS("write", offset, flags);
}
TWIN(ssize_t, pwritev64v2, pwritev2, int, const struct iovec*, int, off64_t, int);

ssize_t readv(int file, const struct iovec* buffers, int count) {
  REAL(readv);
  CALL_BUFFERS("read");
}

ssize_t preadv(int file, const struct iovec* buffers, int count, off_t offset) {
  REAL(preadv);
  CALL_BUFFERS("read", offset);
}
TWIN(ssize_t, preadv64, preadv, int, const struct iovec*, int, off64_t);

ssize_t preadv2(int file, const struct iovec* buffers, int count, off_t offset, int flags) {
  REAL(preadv2);
  CALL_BUFFERS("read", offset, flags);
}
TWIN(ssize_t, preadv64v2, preadv2, int, const struct iovec*, int, off64_t, int);

ssize_t copy_file_range(int from, off64_t* begin, int to, off64_t* to_begin, size_t size, unsigned flags) {
  REAL(copy_file_range);
  CALL(ssize_t, on_descriptors("copy", size, from, to), from, begin, to, to_begin, allowed(injected, size), flags);
}

ssize_t sendfile(int to, int from, off_t* begin, size_t size) {
  REAL(sendfile);
  CALL(ssize_t, on_descriptors("copy", size, from, to), to, from, begin, allowed(injected, size));
}
TWIN(ssize_t, sendfile64, sendfile, int, int, off64_t*, size_t);

int fsync(int file) {
  REAL(fsync);
  CALL(int, on_descriptor("fsync", 0, file), file);
}

int fdatasync(int file) {
  REAL(fdatasync);
  CALL(int, on_descriptor("fsync", 0, file), file);
}

int ftruncate(int file, off_t size) {
  REAL(ftruncate);
  CALL(int, on_descriptor("truncate", size, file), file, size);
}
TWIN(int, ftruncate64, ftruncate, int, off64_t);

int truncate(const char* name, off_t size) {
  REAL(truncate);
  CALL(int, on_name("truncate", size, AT_FDCWD, name), name, size);
}
TWIN(int, truncate64, truncate, const char*, off64_t);

int rename(const char* from, const char* to) {
  REAL(rename);
  CALL(int, on_names("rename", AT_FDCWD, from, AT_FDCWD, to), from, to);
}

int renameat(int directory, const char* from, int to_directory, const char* to) {
  REAL(renameat);
  CALL(int, on_names("rename", directory, from, to_directory, to), directory, from, to_directory, to);
}

int unlink(const char* name) {
  REAL(unlink);
  CALL(int, on_name("unlink", 0, AT_FDCWD, name), name);
}

int unlinkat(int directory, const char* name, int flags) {
  REAL(unlinkat);
  CALL(int, on_name("unlink", 0, directory, name), directory, name, flags);
}

int rmdir(const char* name) {
  REAL(rmdir);
  CALL(int, on_name("unlink", 0, AT_FDCWD, name), name);
}
