// The BLAKE3 hash of a file whose bytes come in any order, from any thread: what b3sum prints of it. See blake3.h.
#pragma once

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "blake3.h"
#include "instruction_sets.h"

namespace perta {

// Bytes that were added are hashed at once; what stays is the values of the largest subtrees that are complete, and the
// bytes of chunks of which a part is missing.
class FileHash {
 public:
  using Range = std::pair<uint64_t, uint64_t>;  // from byte, to byte
  using Value = std::array<unsigned char, blake3::value_bytes>;

  explicit FileHash(uint64_t size);

  // The bytes of the file from `begin` on. Bytes that were added before are passed over. Not beyond the size.
  void add(const BlockKernels& kernels, const unsigned char* bytes, uint64_t begin, uint64_t count);

  // What has not been added yet, in order.
  std::vector<Range> missing();

  // False if bytes are missing.
  bool digest(Value* out);

 private:
  struct Node {
    uint64_t level, index;  // of chunks [index << level, (index + 1) << level)
    Value value;
  };
  struct Fragment {
    std::array<unsigned char, blake3::chunk_bytes> bytes;
    size_t filled = 0;
  };

  std::vector<Range> claim(uint64_t begin, uint64_t end);
  void add_new(const BlockKernels& kernels, const unsigned char* bytes, Range range);
  std::vector<Node> subtrees(const BlockKernels& kernels, const unsigned char* bytes, uint64_t first,
                             size_t count) const;
  void add_fragment(const unsigned char* bytes, Range range);
  void insert(Node node);
  bool is_root(uint64_t level) const { return uint64_t{2} << level == chunks_; }  // the parent of a node of this level

  const uint64_t size_;
  const uint64_t chunks_;  // an empty file has one
  const uint64_t whole_;   // those of 1024 bytes that are not the root
  std::mutex mutex_;
  std::map<uint64_t, uint64_t> claimed_;  // begin: end
  std::map<uint64_t, Fragment> fragments_;
  std::map<std::pair<uint64_t, uint64_t>, Value> nodes_;  // level, index
};

}  // namespace perta
