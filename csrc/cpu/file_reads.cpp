// Reads of byte ranges of files; see file_reads.h.

#include "file_reads.h"

#include <cerrno>

#include <fcntl.h>
#include <unistd.h>

namespace perta {

namespace {

static_assert(sizeof(off_t) == 8, "files are longer than 2 GiB");

constexpr int ends_too_early = -1;

// 0, or what keeps the bytes from being read: errno, or `ends_too_early`.
int read_fully(const FileRead& read) {
  for (uint64_t done = 0; done < read.count;) {
    const ssize_t n =
        pread(read.descriptor, read.target + done, read.count - done, static_cast<off_t>(read.begin + done));
    if (n == 0) return ends_too_early;
    if (n > 0) done += static_cast<uint64_t>(n);
    if (n < 0 && errno != EINTR) return errno;
  }
  return 0;
}

// Advice only: a system that does not take it reads all the same.
void advise([[maybe_unused]] int descriptor, [[maybe_unused]] uint64_t begin, [[maybe_unused]] uint64_t count,
            [[maybe_unused]] bool wanted) {
#ifdef POSIX_FADV_WILLNEED
  const int advice = wanted ? POSIX_FADV_WILLNEED : POSIX_FADV_DONTNEED;
  posix_fadvise(descriptor, static_cast<off_t>(begin), static_cast<off_t>(count), advice);
#endif
}

}  // namespace

std::optional<FailedRead> read_files(const BlockKernels& kernels, const std::vector<FileRead>& reads) {
  for (size_t number = 0; number < reads.size(); ++number) {
    const FileRead& read = reads[number];
    if (const int error = read_fully(read)) return FailedRead{number, error == ends_too_early ? 0 : error};
    if (read.drop_cache) advise(read.descriptor, read.begin, read.count, false);
    if (read.soon_count > 0) advise(read.descriptor, read.soon_begin, read.soon_count, true);
    if (read.hash != nullptr) read.hash->add(kernels, read.target, read.begin, read.count);
  }
  return std::nullopt;
}

}  // namespace perta
