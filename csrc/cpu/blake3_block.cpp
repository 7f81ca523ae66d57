// Values of many BLAKE3 chunks, or of many parents, at once: one in each lane of a vector. See blake3.h.
//
// Bytes: each chunk once, from any address. A vector of 16 lanes does a compression of 16 chunks in about 800
// operations, which is 1024 bytes.
// Compiled once per instruction set, with `static` code only; see rescaled_subtract_block.cpp.

#include <utility>

#include "blake3.h"
#include "instruction_sets.h"

namespace perta::PERTA_ISA {
namespace {

using blake3::block_bytes, blake3::chunk_bytes, blake3::value_bytes;

#if defined(__AVX512F__)
constexpr size_t lanes = 16;
#elif defined(__AVX2__)
constexpr size_t lanes = 8;
#else
constexpr size_t lanes = 4;
#endif

constexpr size_t ahead = 8 * block_bytes;

typedef uint32_t Words __attribute__((vector_size(4 * lanes)));

// One stage of a transposition: words in which bit `step` of row and lane differ change places.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PERTA_SHUFFLES
#endif
#endif

#ifdef PERTA_SHUFFLES
template <size_t step, size_t... lane>
inline __attribute__((always_inline)) void exchange(Words& a, Words& b, std::index_sequence<lane...>) {
  const Words first = __builtin_shufflevector(a, b, (lane & step ? lanes + lane - step : lane)...);
  b = __builtin_shufflevector(a, b, (lane & step ? lanes + lane : lane + step)...);
  a = first;
}
#else
template <size_t step, size_t... lane>
inline void exchange(Words& a, Words& b, std::index_sequence<lane...>) {
  const Words first = {(lane & step ? b[lane - step] : a[lane])...};
  b = Words{(lane & step ? b[lane] : a[lane + step])...};
  a = first;
}
#endif

template <size_t step>
inline __attribute__((always_inline)) void stage(Words* rows) {
  for (size_t i = 0; i < lanes; ++i)
    if ((i & step) == 0) exchange<step>(rows[i], rows[i + step], std::make_index_sequence<lanes>());
}

// Words m[0..16) of the messages at source, source + stride and so on; lanes from `count` on repeat the last message.
inline __attribute__((always_inline)) void load(const unsigned char* source, size_t stride, size_t count, Words* m) {
  for (size_t first = 0; first < 16; first += lanes) {
    Words* rows = m + first;
    for (size_t i = 0; i < lanes; ++i) {
      const size_t message = i < count ? i : count - 1;
      memcpy(&rows[i], source + message * stride + first * 4, sizeof(Words));
    }
    stage<1>(rows);
    stage<2>(rows);
    if constexpr (lanes > 4) stage<4>(rows);
    if constexpr (lanes > 8) stage<8>(rows);
  }
}

void store(const Words* value, size_t count, unsigned char* out) {
  for (size_t i = 0; i < count; ++i) {
    for (size_t word = 0; word < 8; ++word) {
      const uint32_t bits = value[word][i];
      memcpy(out + i * value_bytes + word * 4, &bits, 4);
    }
  }
}

inline void begin(Words* value) {
  for (size_t word = 0; word < 8; ++word) value[word] = Words{} + blake3::initial[word];
}

}  // namespace

HashChunks hash_chunks;
HashParents hash_parents;

void hash_chunks(const unsigned char* data, size_t count, uint64_t first, unsigned char* values) {
  blake3::Compression<Words> compression;
  for (size_t done = 0; done < count; done += lanes) {
    const size_t n = count - done < lanes ? count - done : lanes;
    Words value[8], m[16], low, high;
    begin(value);
    for (size_t i = 0; i < lanes; ++i) {
      low[i] = static_cast<uint32_t>(first + done + i);
      high[i] = static_cast<uint32_t>((first + done + i) >> 32);
    }
    for (size_t at = 0; at < chunk_bytes; at += block_bytes) {
      // So many streams of reads are more than a processor foresees: fetched ahead, at last those of the next chunks.
      const size_t next = at + ahead < chunk_bytes ? at + ahead : at + ahead + (lanes - 1) * chunk_bytes;
      for (size_t i = 0; i < n; ++i) __builtin_prefetch(data + (done + i) * chunk_bytes + next);
      load(data + done * chunk_bytes + at, chunk_bytes, n, m);
      const uint32_t flags =
          (at == 0 ? blake3::chunk_start : 0) | (at + block_bytes == chunk_bytes ? blake3::chunk_end : 0);
      compression.run(value, m, low, high, block_bytes, flags);
    }
    store(value, n, values + done * value_bytes);
  }
}

void hash_parents(const unsigned char* children, size_t count, unsigned char* values) {
  blake3::Compression<Words> compression;
  for (size_t done = 0; done < count; done += lanes) {
    const size_t n = count - done < lanes ? count - done : lanes;
    Words value[8], m[16];
    begin(value);
    load(children + done * 2 * value_bytes, 2 * value_bytes, n, m);
    compression.run(value, m, Words{}, Words{}, block_bytes, blake3::parent);
    store(value, n, values + done * value_bytes);
  }
}

}  // namespace perta::PERTA_ISA
