// out = round(theta - (lam w) (theta_f - theta_0)), the formula of rescale.h, and the sums that the report needs.
//
// A block is read, converted to float32, computed, rounded and stored by plain loops that the compiler vectorises. A
// task vector given by its factors (low_rank_subtract) is made block by block first.
// Memory, not arithmetic, is what it waits for: with four or five arrays at once a processor foresees too little. So of
// arrays that are read where they lie, what comes next is fetched ahead, a little with every line of the cache.
// Assumes nothing of addresses: sources may lie at any byte of a file in memory, and `out` may be `theta`.
// Bytes: each input once, out once; factors stay in the caches. FLOPs: those of rescale.h, and 2 a rank and element.
//
// Compiled once per instruction set (PERTA_ISA is its name), with `static` code only: a shared inline function could
// be linked in from the wrong set.

#include <type_traits>

#include "instruction_sets.h"
#include "storage.h"

namespace perta::PERTA_ISA {
namespace {

// How elements are stored; see storage.h for why pointers become unaligned ones in plain functions.
struct F32 {
  static constexpr size_t size = 4;
  static float load(const void* data, size_t i) { return read_f32(data, i); }
  static float round(float value) { return value; }
  static float widen(float value) { return value; }
  static void store(void* data, size_t i, float value) { static_cast<UnalignedFloat*>(data)[i] = value; }
};

struct BF16 {
  static constexpr size_t size = 2;
  static float load(const void* data, size_t i) { return read_bf16(data, i); }
  static uint16_t round(float value) { return float_to_bf16(value); }
  static float widen(uint16_t bits) { return bf16_to_float(bits); }
  static void store(void* data, size_t i, uint16_t bits) { static_cast<UnalignedHalf*>(data)[i] = bits; }
};

struct F16 {
  static constexpr size_t size = 2;
  static float load(const void* data, size_t i) { return read_f16(data, i); }
  static uint16_t round(float value) { return float_to_f16(value); }
  static float widen(uint16_t bits) { return f16_to_float(bits); }
  static void store(void* data, size_t i, uint16_t bits) { static_cast<UnalignedHalf*>(data)[i] = bits; }
};

// Elements [begin, begin + n) of a task vector given by its factors. The products of an element are added in the
// order of the rank, each sum rounded, and the scale comes last: every backend then gives the same bits.
void multiply_factors(const LowRank& task, size_t begin, size_t n, float* out) {
  size_t row = begin / task.columns, column = begin % task.columns;
  for (size_t done = 0; done < n;) {
    const size_t run = n - done < task.columns - column ? n - done : task.columns - column;
    const float* left = task.left + row * task.rank;
    const float* right = task.right + column;
    float* sums = out + done;
    for (size_t i = 0; i < run; ++i) sums[i] = 0.0f;
    size_t k = 0;
    for (; k + 4 <= task.rank; k += 4) {
      const float a = left[k], b = left[k + 1], c = left[k + 2], d = left[k + 3];
      const float* r = right + k * task.columns;
      const float* s = r + task.columns;
      const float* t = s + task.columns;
      const float* u = t + task.columns;
#pragma GCC ivdep
      for (size_t i = 0; i < run; ++i) sums[i] = (((sums[i] + a * r[i]) + b * s[i]) + c * t[i]) + d * u[i];
    }
    for (; k < task.rank; ++k) {
      const float* r = right + k * task.columns;
#pragma GCC ivdep
      for (size_t i = 0; i < run; ++i) sums[i] += left[k] * r[i];
    }
    for (size_t i = 0; i < run; ++i) sums[i] *= task.scale;
    done += run;
    ++row;
    column = 0;
  }
}

// One block as the inner loop sees it.
struct Block {
  void* out;
  const void* theta;
  const void* tuned;
  const void* base;
  const void* forget;
  const void* retain;
  size_t n;
};

constexpr size_t line = 64;     // bytes of the cache that come together
constexpr size_t lanes = 32;    // elements of the longest line
constexpr size_t ahead = 3072;  // bytes: less comes too late, more is out of the first-level cache again

template <class Weights>
constexpr size_t in_line = line / Weights::size;  // elements
static_assert(block % lanes == 0, "only the last block of an array is filled up to whole lines");

// float32 sums over one block, in each lane one of its own. If any value is not finite, its sum is not either. So the
// check costs nothing, and the slow path then finds where the value is.
struct BlockSums {
  float weight[lanes] = {};
  float importance[lanes] = {};
  float squared_theta[lanes] = {};
  float squared_change[lanes] = {};
  uint32_t task_bits[lanes] = {};
  int32_t changed[lanes] = {};
  int32_t invalid_ratio[lanes] = {};
};

template <class Number>
Number total(const Number (&sums)[lanes]) {
  Number sum = 0;
  for (const Number of_lane : sums) sum += of_lane;
  return sum;
}

// One element of each array as float32; what weighs is 0 where it is not read.
struct Element {
  float theta, tuned, base, forget, retain;
};

#define PERTA_INLINE static inline __attribute__((always_inline))

// The result as it is stored. If all is in the cache, the sums cost as much as the result, so they are left out unless
// they are wanted.
template <class Result, bool counted, Power power, Weighted weighted, bool masked>
PERTA_INLINE auto subtract_element(const Element& element, const Rescaling& rescaling, BlockSums& sums, size_t lane) {
  const float task = element.tuned - element.base;
  float scale = rescaling.lam;
  if (weighted == Weighted::by_pair) {
    const float w = weight<power, masked>(element.forget, element.retain, rescaling);
    scale = rescaling.lam * w;
    if (counted) {
      sums.weight[lane] += w;
      sums.importance[lane] += fabsf(element.forget) + fabsf(element.retain);
    }
  }
  if (weighted == Weighted::by_ratio) {
    const float w = weight_of_ratio<power, masked>(element.retain, rescaling);
    scale = rescaling.lam * w;
    if (counted) {
      sums.weight[lane] += w;
      sums.invalid_ratio[lane] += !(element.retain >= 0.0f);
    }
  }
  const auto stored = Result::round(subtract(element.theta, scale * task));
  if (counted) {
    const float change = Result::widen(stored) - element.theta;
    sums.squared_theta[lane] += element.theta * element.theta;
    sums.squared_change[lane] += change * change;
    sums.changed[lane] += change != 0.0f;
    sums.task_bits[lane] |= bits_of(task);
  }
  return stored;
}

// Elements [first, first + in_line). Parameters: storage of theta, theta_f and theta_0; of the importances; of the
// result.
template <class Weights, class Importance, class Result, bool counted, Power power, Weighted weighted, bool masked>
PERTA_INLINE void subtract_singly(const Block& block, size_t first, const Rescaling& rescaling, BlockSums& sums) {
#pragma omp simd
  for (size_t lane = 0; lane < in_line<Weights>; ++lane) {
    const size_t i = first + lane;
    const Element element{Weights::load(block.theta, i), Weights::load(block.tuned, i), Weights::load(block.base, i),
                          weighted == Weighted::by_pair ? Importance::load(block.forget, i) : 0.0f,
                          weighted != Weighted::no ? Importance::load(block.retain, i) : 0.0f};
    const auto stored = subtract_element<Result, counted, power, weighted, masked>(element, rescaling, sums, lane);
    Result::store(block.out, i, stored);
  }
}

PERTA_INLINE float lower(uint32_t pair) { return float_of(pair << 16); }
PERTA_INLINE float upper(uint32_t pair) { return float_of(pair & 0xFFFF0000u); }

// Elements [first, first + lanes) where all arrays are bfloat16. Two neighbours are taken apart where they lie, in one
// word. Spreading 16 bits to 32 and packing them again costs a fifth of the time where all is in the cache.
template <bool counted, Power power, Weighted weighted, bool masked>
PERTA_INLINE void subtract_in_pairs(const Block& block, size_t first, const Rescaling& rescaling, BlockSums& sums) {
#pragma omp simd
  for (size_t lane = 0; lane < lanes / 2; ++lane) {
    const size_t i = first / 2 + lane;
    const uint32_t theta = read_word(block.theta, i), tuned = read_word(block.tuned, i);
    const uint32_t base = read_word(block.base, i);
    const uint32_t forget = weighted == Weighted::by_pair ? read_word(block.forget, i) : 0;
    const uint32_t retain = weighted != Weighted::no ? read_word(block.retain, i) : 0;
    const Element one{lower(theta), lower(tuned), lower(base), lower(forget), lower(retain)};
    const Element two{upper(theta), upper(tuned), upper(base), upper(forget), upper(retain)};
    const uint32_t low = subtract_element<BF16, counted, power, weighted, masked>(one, rescaling, sums, lane);
    const uint32_t high = subtract_element<BF16, counted, power, weighted, masked>(two, rescaling, sums, lane);
    static_cast<UnalignedWord*>(block.out)[i] = low | high << 16;
  }
}

// What lies `ahead` of n elements from the first on.
template <class Storage>
PERTA_INLINE void prefetch(const void* data, size_t first, size_t n) {
  const char* next = static_cast<const char*>(data) + first * Storage::size + ahead;
  for (size_t at = 0; at < n * Storage::size; at += line) __builtin_prefetch(next + at);
}

// A block of whole lines.
template <class Weights, class Importance, class Result, bool counted, Power power, Weighted weighted, bool masked>
BlockSums subtract_block(Block block, Rescaling rescaling) {
  constexpr bool bf16_importance = weighted == Weighted::no || std::is_same_v<Importance, BF16>;
  constexpr bool all_bf16 = std::is_same_v<Weights, BF16> && std::is_same_v<Result, BF16> && bf16_importance;
  constexpr size_t n = in_line<Weights>;
  BlockSums sums;
  for (size_t i = 0; i < block.n; i += n) {
    prefetch<Weights>(block.theta, i, n);
    prefetch<Weights>(block.tuned, i, n);
    prefetch<Weights>(block.base, i, n);
    if (weighted == Weighted::by_pair) prefetch<Importance>(block.forget, i, n);
    if (weighted != Weighted::no) prefetch<Importance>(block.retain, i, n);
    if constexpr (all_bf16) {
      subtract_in_pairs<counted, power, weighted, masked>(block, i, rescaling, sums);
    } else {
      subtract_singly<Weights, Importance, Result, counted, power, weighted, masked>(block, i, rescaling, sums);
    }
  }
  return sums;
}

using SubtractBlock = BlockSums (*)(Block, Rescaling);

template <class Weights, class Importance, class Result, bool counted, Weighted weighted, bool masked>
SubtractBlock choose_power(float p) {
  switch (power_of(p)) {
    case Power::one:
      return subtract_block<Weights, Importance, Result, counted, Power::one, weighted, masked>;
    case Power::two:
      return subtract_block<Weights, Importance, Result, counted, Power::two, weighted, masked>;
    case Power::half:
      return subtract_block<Weights, Importance, Result, counted, Power::half, weighted, masked>;
    default:
      return subtract_block<Weights, Importance, Result, counted, Power::general, weighted, masked>;
  }
}

template <class Weights, class Importance, class Result, bool counted, Weighted weighted>
SubtractBlock choose_mask(const Rescaling& rescaling) {
  return rescaling.masked ? choose_power<Weights, Importance, Result, counted, weighted, true>(rescaling.p)
                          : choose_power<Weights, Importance, Result, counted, weighted, false>(rescaling.p);
}

template <class Weights, class Result, bool counted>
SubtractBlock choose_importance(Weighted weighted, DType importance, const Rescaling& rescaling) {
  constexpr Weighted by_pair = Weighted::by_pair, by_ratio = Weighted::by_ratio;
  const bool bf16 = importance == DType::bf16;
  switch (weighted) {
    case by_pair:
      return bf16 ? choose_mask<Weights, BF16, Result, counted, by_pair>(rescaling)
                  : choose_mask<Weights, F32, Result, counted, by_pair>(rescaling);
    case by_ratio:
      return bf16 ? choose_mask<Weights, BF16, Result, counted, by_ratio>(rescaling)
                  : choose_mask<Weights, F32, Result, counted, by_ratio>(rescaling);
    default:
      return subtract_block<Weights, F32, Result, counted, Power::one, Weighted::no, false>;
  }
}

template <class Weights, class Result>
SubtractBlock choose(Weighted weighted, DType importance, const Rescaling& rescaling, bool counted) {
  return counted ? choose_importance<Weights, Result, true>(weighted, importance, rescaling)
                 : choose_importance<Weights, Result, false>(weighted, importance, rescaling);
}

// n elements of float32 or bfloat16 in `buffer`, where they are or are copied to, filled up to whole lines.
const void* filled_up(const void* data, DType dtype, size_t n, float* buffer, float filler) {
  if (data != buffer) memcpy(buffer, data, n * size_of(dtype));
  for (size_t i = n; i % lanes != 0; ++i) {
    if (dtype == DType::bf16) {
      BF16::store(buffer, i, float_to_bf16(filler));
    } else {
      buffer[i] = filler;
    }
  }
  return buffer;
}

int64_t count_nonfinite(const void* data, DType dtype, size_t begin, size_t end) {
  int64_t count = 0;
  float buffer[block];
  for (size_t i = begin; i < end; i += block) {
    const size_t n = end - i < block ? end - i : block;
    const auto* values = static_cast<const UnalignedFloat*>(stored_as(DType::f32, data, dtype, i, n, buffer));
    for (size_t k = 0; k < n; ++k) count += !is_finite(values[k]);
  }
  return count;
}

}  // namespace

RescaledSubtractBlock rescaled_subtract;

void rescaled_subtract(const RescaleArrays& arrays, const Rescaling& rescaling, size_t begin, size_t end,
                       RescaleStatistics* statistics) {
  // The common types are read directly; any other mix is first converted block by block.
  const Weighted weighted = weighted_by(arrays);
  const LowRank* low_rank = arrays.low_rank;
  const bool bf16_weights = low_rank == nullptr && arrays.theta_dtype == DType::bf16 &&
                            arrays.tuned_dtype == DType::bf16 && arrays.base_dtype == DType::bf16;
  const bool bf16_importance =
      arrays.retain_dtype == DType::bf16 && (weighted == Weighted::by_ratio || arrays.forget_dtype == DType::bf16);
  const DType weights = bf16_weights ? DType::bf16 : DType::f32;
  const DType importance = bf16_importance ? DType::bf16 : DType::f32;
  const SubtractBlock subtract_block_as_asked =
      bf16_weights                        ? choose<BF16, BF16>(weighted, importance, rescaling, statistics)
      : arrays.theta_dtype == DType::bf16 ? choose<F32, BF16>(weighted, importance, rescaling, statistics)
      : arrays.theta_dtype == DType::f16  ? choose<F32, F16>(weighted, importance, rescaling, statistics)
                                          : choose<F32, F32>(weighted, importance, rescaling, statistics);
  alignas(64) float buffers[6][block];
  // A task vector given by its factors is made block by block. It takes the place of theta_f, with theta_0 = 0.
  if (low_rank != nullptr) memset(buffers[2], 0, sizeof buffers[2]);
  for (size_t i = begin; i < end; i += block) {
    const size_t n = end - i < block ? end - i : block;
    const bool whole = n % lanes == 0;  // else all go through buffers, filled up with elements that change no sum
    const auto operand = [&](DType wanted, const void* data, DType dtype, float* buffer, float filler) {
      const void* found = stored_as(wanted, data, dtype, i, n, buffer);
      return whole ? found : filled_up(found, wanted, n, buffer, filler);
    };
    unsigned char* out = const_cast<unsigned char*>(at(arrays.out, arrays.theta_dtype, i));
    Block part{whole ? out : static_cast<void*>(buffers[5]),
               operand(weights, arrays.theta, arrays.theta_dtype, buffers[0], 0),
               buffers[1],
               buffers[2],
               nullptr,
               nullptr,
               (n + lanes - 1) / lanes * lanes};
    if (low_rank != nullptr) {
      multiply_factors(*low_rank, low_rank->first + i, n, buffers[1]);
      filled_up(buffers[1], DType::f32, n, buffers[1], 0);
    } else {
      part.tuned = operand(weights, arrays.tuned, arrays.tuned_dtype, buffers[1], 0);
      part.base = operand(weights, arrays.base, arrays.base_dtype, buffers[2], 0);
    }
    if (weighted == Weighted::by_pair) {
      part.forget = operand(importance, arrays.forget, arrays.forget_dtype, buffers[3], 0);
    }
    if (weighted != Weighted::no) {
      const float without_weight = weighted == Weighted::by_ratio ? INFINITY : 0;
      part.retain = operand(importance, arrays.retain, arrays.retain_dtype, buffers[4], without_weight);
    }
    const BlockSums sums = subtract_block_as_asked(part, rescaling);
    if (!whole) memcpy(out, buffers[5], n * size_of(arrays.theta_dtype));
    if (statistics == nullptr) continue;
    const float squared_change = total(sums.squared_change);
    uint32_t task_bits = 0;
    for (const uint32_t of_lane : sums.task_bits) task_bits |= of_lane;
    statistics->sum_weight += weighted == Weighted::no ? static_cast<double>(n) : total(sums.weight);
    statistics->sum_squared_theta += total(sums.squared_theta);
    statistics->sum_squared_change += squared_change;
    statistics->changed += total(sums.changed);
    statistics->invalid_ratio += total(sums.invalid_ratio);
    statistics->nonzero_task |= (task_bits & 0x7FFFFFFFu) != 0;
    if (!is_finite(squared_change)) {
      statistics->nonfinite_out += count_nonfinite(arrays.out, arrays.theta_dtype, i, i + n);
    }
    if (weighted == Weighted::by_pair && !is_finite(total(sums.importance))) {
      statistics->nonfinite_forget += count_nonfinite(arrays.forget, arrays.forget_dtype, i, i + n);
      statistics->nonfinite_retain += count_nonfinite(arrays.retain, arrays.retain_dtype, i, i + n);
    }
  }
}

}  // namespace perta::PERTA_ISA
