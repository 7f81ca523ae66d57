// Bytes of files, read by position into memory and hashed on the way: all that a chunk needs in one call. Between
// calls of their own, threads would wait for Python's lock longer than they work.
//
// Bytes: each is read once from the file, and once from memory if it is hashed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "file_hash.h"

namespace perta {

struct FileRead {
  int descriptor;
  unsigned char* target;
  uint64_t begin, count;            // bytes of the file
  uint64_t soon_begin, soon_count;  // bytes that will be asked for soon, which the system may begin to read
  bool drop_cache;                  // give its pages back to the system
  FileHash* hash;                   // nullptr: not hashed
};

struct FailedRead {
  size_t number;
  int error;  // as errno has it; 0: the file ends too early
};

// One after another, up to the first that fails.
std::optional<FailedRead> read_files(const BlockKernels& kernels, const std::vector<FileRead>& reads);

}  // namespace perta
