// The tree of a file's BLAKE3 hash, put together from pieces. Values of chunks and parents: blake3_block.cpp.

#include "file_hash.h"

#include <algorithm>

namespace perta {

namespace {

using blake3::block_bytes, blake3::chunk_bytes, blake3::value_bytes;

// One compression of up to 64 bytes.
void compress(uint32_t* value, const unsigned char* bytes, size_t length, uint64_t counter, uint32_t flags) {
  uint32_t m[16] = {};
  memcpy(m, bytes, length);
  blake3::Compression<uint32_t>().run(value, m, static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32),
                                      static_cast<uint32_t>(length), flags);
}

FileHash::Value chunk_value(const unsigned char* bytes, size_t length, uint64_t counter, uint32_t flags) {
  uint32_t value[8];
  memcpy(value, blake3::initial, sizeof value);
  size_t at = 0;
  do {
    const size_t n = std::min(block_bytes, length - at);
    const bool last = at + n == length;
    compress(value, bytes + at, n, counter,
             (at == 0 ? blake3::chunk_start : 0) | (last ? blake3::chunk_end | flags : 0));
    at += n;
  } while (at < length);
  FileHash::Value out;
  memcpy(out.data(), value, value_bytes);
  return out;
}

FileHash::Value parent_value(const FileHash::Value& left, const FileHash::Value& right, uint32_t flags) {
  unsigned char both[2 * value_bytes];
  memcpy(both, left.data(), value_bytes);
  memcpy(both + value_bytes, right.data(), value_bytes);
  uint32_t value[8];
  memcpy(value, blake3::initial, sizeof value);
  compress(value, both, sizeof both, 0, blake3::parent | flags);
  FileHash::Value out;
  memcpy(out.data(), value, value_bytes);
  return out;
}

}  // namespace

FileHash::FileHash(uint64_t size)
    : size_(size),
      chunks_(size == 0 ? 1 : (size + chunk_bytes - 1) / chunk_bytes),
      whole_(chunks_ == 1 ? 0 : size / chunk_bytes) {}

void FileHash::add(const BlockKernels& kernels, const unsigned char* bytes, uint64_t begin, uint64_t count) {
  for (const Range& range : claim(begin, begin + count)) add_new(kernels, bytes + (range.first - begin), range);
}

// Notes [begin, end) as added, and returns the parts of it that were not.
std::vector<FileHash::Range> FileHash::claim(uint64_t begin, uint64_t end) {
  std::vector<Range> fresh;
  if (begin >= end) return fresh;
  const std::lock_guard<std::mutex> locked(mutex_);
  auto next = claimed_.upper_bound(begin);
  if (next != claimed_.begin() && std::prev(next)->second >= begin) --next;  // one that reaches to begin
  uint64_t at = begin, first = begin, last = end;
  while (next != claimed_.end() && next->first <= end) {
    if (at < next->first) fresh.emplace_back(at, next->first);
    at = std::max(at, next->second);
    first = std::min(first, next->first);
    last = std::max(last, next->second);
    next = claimed_.erase(next);
  }
  if (at < end) fresh.emplace_back(at, end);
  claimed_[first] = last;
  return fresh;
}

void FileHash::add_new(const BlockKernels& kernels, const unsigned char* bytes, Range range) {
  const auto [begin, end] = range;
  const uint64_t first = (begin + chunk_bytes - 1) / chunk_bytes, last = std::min(end / chunk_bytes, whole_);
  if (first >= last) {
    add_fragment(bytes, range);
    return;
  }
  const uint64_t inner = first * chunk_bytes, inner_end = last * chunk_bytes;
  const std::vector<Node> nodes = subtrees(kernels, bytes + (inner - begin), first, last - first);
  {
    const std::lock_guard<std::mutex> locked(mutex_);
    for (const Node& node : nodes) insert(node);
  }
  add_fragment(bytes, {begin, inner});
  add_fragment(bytes + (inner_end - begin), {inner_end, end});
}

// The values of the largest complete subtrees that `count` chunks from `first` on make.
std::vector<FileHash::Node> FileHash::subtrees(const BlockKernels& kernels, const unsigned char* bytes, uint64_t first,
                                               size_t count) const {
  std::vector<unsigned char> values(count * value_bytes);
  kernels.hash_chunks(bytes, count, first, values.data());
  std::vector<Node> nodes;
  unsigned char* at = values.data();
  for (uint64_t level = 0; count > 0; ++level) {
    const auto take = [&](size_t k) {
      Node node{level, first + k, {}};
      memcpy(node.value.data(), at + k * value_bytes, value_bytes);
      nodes.push_back(node);
    };
    if (is_root(level)) {
      for (size_t k = 0; k < count; ++k) take(k);
      break;
    }
    if (first % 2 == 1) {
      take(0);
      ++first, --count, at += value_bytes;
    }
    if (count % 2 == 1) take(--count);
    first /= 2, count /= 2;
    kernels.hash_parents(at, count, at);
  }
  return nodes;
}

void FileHash::add_fragment(const unsigned char* bytes, Range range) {
  const std::lock_guard<std::mutex> locked(mutex_);
  for (auto [at, end] = range; at < end;) {
    const uint64_t index = at / chunk_bytes, begin = index * chunk_bytes;
    const size_t length = std::min<uint64_t>(chunk_bytes, size_ - begin), n = std::min(begin + length, end) - at;
    Fragment& fragment = fragments_[index];
    memcpy(fragment.bytes.data() + (at - begin), bytes, n);
    fragment.filled += n;
    if (fragment.filled == length && chunks_ > 1) {
      insert({0, index, chunk_value(fragment.bytes.data(), length, index, 0)});
      fragments_.erase(index);
    }
    at += n, bytes += n;
  }
}

// Adds a value to the tree, and makes parents as long as both children are there. The root is left to `digest`.
void FileHash::insert(Node node) {
  while (!is_root(node.level)) {
    const auto sibling = nodes_.find({node.level, node.index ^ 1});
    if (sibling == nodes_.end()) break;
    const bool left = node.index % 2 == 0;
    node.value = left ? parent_value(node.value, sibling->second, 0) : parent_value(sibling->second, node.value, 0);
    nodes_.erase(sibling);
    ++node.level, node.index /= 2;
  }
  nodes_[{node.level, node.index}] = node.value;
}

std::vector<FileHash::Range> FileHash::missing() {
  const std::lock_guard<std::mutex> locked(mutex_);
  std::vector<Range> ranges;
  uint64_t at = 0;
  for (const auto& [begin, end] : claimed_) {
    if (at < begin) ranges.emplace_back(at, begin);
    at = end;
  }
  if (at < size_) ranges.emplace_back(at, size_);
  return ranges;
}

bool FileHash::digest(Value* out) {
  if (!missing().empty()) return false;
  const std::lock_guard<std::mutex> locked(mutex_);
  if (chunks_ == 1) {
    *out = chunk_value(fragments_[0].bytes.data(), size_, 0, blake3::root);
    return true;
  }
  // From left to right, the largest subtrees that are complete: one for each bit of the number of chunks, or, if that
  // has only one bit, two halves. They are joined from the right.
  std::vector<Value> values;
  uint64_t begin = 0;
  for (uint64_t level = 64; level-- > 0;) {
    const uint64_t width = uint64_t{1} << level;
    const bool power_of_two = (chunks_ & (chunks_ - 1)) == 0;
    const uint64_t count = power_of_two ? (width * 2 == chunks_ ? 2 : 0) : (chunks_ & width ? 1 : 0);
    for (uint64_t k = 0; k < count; ++k, begin += width) {
      const auto found = nodes_.find({level, begin >> level});
      if (found == nodes_.end()) return false;  // another thread is at it
      values.push_back(found->second);
    }
  }
  Value value = values.back();
  for (size_t k = values.size() - 1; k-- > 0;) value = parent_value(values[k], value, k == 0 ? blake3::root : 0);
  *out = value;
  return true;
}

}  // namespace perta
