// BLAKE3 (https://github.com/BLAKE3-team/BLAKE3-specs), as the command b3sum has it: the numbers that its parts share.
//
// A file is cut into chunks of 1024 bytes. A chunk's value is 16 compressions of 64 bytes; the value of a parent is one
// compression of the values of its two children; the root is compressed with a flag of its own. So complete subtrees
// can be hashed in any order and on any thread.
// Assumes a little-endian machine, as safetensors does.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace perta::blake3 {

constexpr size_t chunk_bytes = 1024, block_bytes = 64, value_bytes = 32, rounds = 7;
constexpr uint32_t chunk_start = 1, chunk_end = 2, parent = 4, root = 8;  // flags

constexpr uint32_t initial[8] = {0x6A09E667u, 0xBB67AE85u, 0x3C6EF372u, 0xA54FF53Au,
                                 0x510E527Fu, 0x9B05688Cu, 0x1F83D9ABu, 0x5BE0CD19u};

// Which word of the message stands where in each round.
constexpr std::array<std::array<int, 16>, rounds> schedule_of_rounds() {
  constexpr int permutation[16] = {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8};
  std::array<std::array<int, 16>, rounds> schedule{};
  for (int i = 0; i < 16; ++i) schedule[0][i] = i;
  for (size_t r = 1; r < rounds; ++r)
    for (int i = 0; i < 16; ++i) schedule[r][i] = schedule[r - 1][permutation[i]];
  return schedule;
}
constexpr std::array<std::array<int, 16>, rounds> schedule = schedule_of_rounds();

// The compression function. Word is uint32_t, or a vector that does as many compressions as it has lanes.
// value (8 words) becomes the next value; m: 16 words of the message.
template <class Word>
struct Compression {
  Word v[16];

  static inline __attribute__((always_inline)) Word rotate(Word x, int n) { return (x >> n) | (x << (32 - n)); }

  inline __attribute__((always_inline)) void mix(int a, int b, int c, int d, const Word& x, const Word& y) {
    v[a] = v[a] + v[b] + x;
    v[d] = rotate(v[d] ^ v[a], 16);
    v[c] = v[c] + v[d];
    v[b] = rotate(v[b] ^ v[c], 12);
    v[a] = v[a] + v[b] + y;
    v[d] = rotate(v[d] ^ v[a], 8);
    v[c] = v[c] + v[d];
    v[b] = rotate(v[b] ^ v[c], 7);
  }

  template <size_t r>
  inline __attribute__((always_inline)) void round(const Word* m) {
    constexpr std::array<int, 16> s = schedule[r];
    mix(0, 4, 8, 12, m[s[0]], m[s[1]]);
    mix(1, 5, 9, 13, m[s[2]], m[s[3]]);
    mix(2, 6, 10, 14, m[s[4]], m[s[5]]);
    mix(3, 7, 11, 15, m[s[6]], m[s[7]]);
    mix(0, 5, 10, 15, m[s[8]], m[s[9]]);
    mix(1, 6, 11, 12, m[s[10]], m[s[11]]);
    mix(2, 7, 8, 13, m[s[12]], m[s[13]]);
    mix(3, 4, 9, 14, m[s[14]], m[s[15]]);
  }

  // counter: of the chunk, 0 for a parent. length: bytes of the message.
  inline __attribute__((always_inline)) void run(Word* value, const Word* m, Word counter_low, Word counter_high,
                                                 uint32_t length, uint32_t flags) {
    const Word zero = value[0] ^ value[0];
    for (int i = 0; i < 8; ++i) v[i] = value[i];
    for (int i = 0; i < 4; ++i) v[8 + i] = zero + initial[i];
    v[12] = counter_low;
    v[13] = counter_high;
    v[14] = zero + length;
    v[15] = zero + flags;
    round<0>(m);
    round<1>(m);
    round<2>(m);
    round<3>(m);
    round<4>(m);
    round<5>(m);
    round<6>(m);
    for (int i = 0; i < 8; ++i) value[i] = v[i] ^ v[8 + i];
  }
};

}  // namespace perta::blake3
