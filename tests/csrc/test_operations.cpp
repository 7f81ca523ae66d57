// The operations on whole arrays against plain loops, hashes by pieces against whole ones, and reads of files: odd
// sizes and addresses, every storage type, NaN and infinities. Every number of threads gives the same bits.
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "check.h"
#include "file_hash.h"
#include "file_reads.h"
#include "operations.h"
#include "parallel.h"

using namespace perta;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

// Numbers that are the same everywhere: a linear congruence, in [-1, 1).
struct Draw {
  uint32_t state;
  float operator()() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0f;
  }
};

std::vector<float> drawn(size_t n, uint32_t seed) {
  Draw draw{seed};
  std::vector<float> values(n);
  for (float& value : values) value = draw();
  return values;
}

void every_index_once() {
  for (size_t count : {0, 1, 2, 7, 1000}) {
    for (int threads : {0, 1, 2, 3, 8}) {
      std::vector<std::atomic<int>> calls(count);
      parallel_for(count, threads, [&](size_t k) {
        ++calls[k];
        parallel_for(3, threads, [](size_t) {});  // from within: on this thread
      });
      bool once = true;
      for (const std::atomic<int>& number : calls) once = once && number == 1;
      CHECK(once);
    }
  }
  CHECK(available_threads() >= 1);
}

// The same numbers as they are stored, from an odd address on, and as they read back.
struct Stored {
  DType dtype;
  std::vector<unsigned char> bytes;

  Stored(const std::vector<float>& numbers, DType type) : dtype(type), bytes(numbers.size() * size_of(type) + 1) {
    for (size_t i = 0; i < numbers.size(); ++i) put(i, numbers[i]);
  }

  void* data() { return bytes.data() + 1; }

  void put(size_t i, float value) {
    unsigned char* place = bytes.data() + 1 + i * size_of(dtype);
    if (dtype == DType::f32) {
      memcpy(place, &value, sizeof value);
    } else {
      const uint16_t half = dtype == DType::bf16 ? float_to_bf16(value) : float_to_f16(value);
      memcpy(place, &half, sizeof half);
    }
  }

  float read(size_t i) const {
    const unsigned char* place = bytes.data() + 1 + i * size_of(dtype);
    if (dtype == DType::f32) {
      float value;
      memcpy(&value, place, sizeof value);
      return value;
    }
    uint16_t half;
    memcpy(&half, place, sizeof half);
    return dtype == DType::bf16 ? bf16_to_float(half) : f16_to_float(half);
  }
};

// Equal to the last bit, but for the bits of a NaN: those of a sum depend on the order of its terms.
bool same(float a, float b) { return bits_of(a) == bits_of(b) || (a != a && b != b); }

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  bool equal = a.size() == b.size();
  for (size_t i = 0; equal && i < a.size(); ++i) equal = same(a[i], b[i]);
  return equal;
}

void accumulating(const BlockKernels& kernels) {
  for (size_t n : {0, 1, 3, 1023, 1025, 300001}) {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      std::vector<float> numbers = drawn(n, 2);
      if (n > 3) numbers[0] = infinity, numbers[1] = not_a_number;
      Stored gradient(numbers, dtype);
      for (bool squared : {false, true}) {
        const std::vector<float> start = drawn(n, 1);
        std::vector<float> expected = start;
        for (size_t i = 0; i < n; ++i) {
          const float value = gradient.read(i);
          expected[i] += squared ? value * value : value;
        }
        for (int threads : {1, 3, 8}) {
          std::vector<float> sums = start;
          accumulate(kernels, sums.data(), gradient.data(), dtype, squared, n, threads);
          CHECK(same(sums, expected));
        }
      }
    }
  }
}

template <bool masked>
float weight_of(float forget, float retain, const Rescaling& rescaling) {
  switch (power_of(rescaling.p)) {
    case Power::one:
      return weight<Power::one, masked>(forget, retain, rescaling);
    case Power::two:
      return weight<Power::two, masked>(forget, retain, rescaling);
    case Power::half:
      return weight<Power::half, masked>(forget, retain, rescaling);
    default:
      return weight<Power::general, masked>(forget, retain, rescaling);
  }
}

template <bool masked>
float ratio_weight_of(float ratio, const Rescaling& rescaling) {
  switch (power_of(rescaling.p)) {
    case Power::one:
      return weight_of_ratio<Power::one, masked>(ratio, rescaling);
    case Power::two:
      return weight_of_ratio<Power::two, masked>(ratio, rescaling);
    case Power::half:
      return weight_of_ratio<Power::half, masked>(ratio, rescaling);
    default:
      return weight_of_ratio<Power::general, masked>(ratio, rescaling);
  }
}

struct Types {
  DType theta, tuned, base, forget, retain;
};

enum class Task {
  difference,
  weighted_difference,
  difference_by_ratio,
  low_rank,
  weighted_low_rank,
  low_rank_by_ratio
};

constexpr Weighted weighted_of(Task task) {
  if (task == Task::weighted_difference || task == Task::weighted_low_rank) return Weighted::by_pair;
  return task == Task::difference || task == Task::low_rank ? Weighted::no : Weighted::by_ratio;
}

// One tensor to subtract from, and what a plain loop makes of it. From 8 elements on it holds NaN and infinities.
struct Subtraction {
  static constexpr size_t rank = 6, columns = 17, first = 5;

  Rescaling rescaling;
  size_t n;
  Weighted weighted;
  bool of_factors;
  Stored theta, tuned, base, forget, retain;
  std::vector<float> left, right;
  LowRank low_rank;
  std::vector<float> expected;
  RescaleStatistics statistics;

  Subtraction(Types types, const Rescaling& how, Task task, size_t count)
      : rescaling(how),
        n(count),
        weighted(weighted_of(task)),
        of_factors(task >= Task::low_rank),
        theta(drawn(n, 1), types.theta),
        tuned(drawn(n, 2), types.tuned),
        base(drawn(n, 3), types.base),
        forget(drawn(n, 4), types.forget),
        retain(drawn(n, 5), types.retain),
        left(drawn(((first + n) / columns + 1) * rank, 6)),
        right(drawn(rank * columns, 7)),
        low_rank{left.data(), right.data(), rank, columns, 0.25f, first},
        expected(n) {
    if (n >= 8) {
      retain.put(0, not_a_number);
      retain.put(1, infinity);  // w = 0: theta stays
      retain.put(2, -infinity);
      forget.put(3, not_a_number);
      forget.put(4, infinity);
      forget.put(5, 0.0f), retain.put(5, 0.0f);                                // no evidence: theta stays
      theta.put(6, 65504.0f), tuned.put(6, -60000.0f), base.put(6, 60000.0f);  // beyond float16 with w = 1
      theta.put(7, infinity);
    }
    for (size_t i = 0; i < n; ++i) expect(i);
  }
  Subtraction(const Subtraction&) = delete;

  float task_vector(size_t i) const {
    if (!of_factors) return tuned.read(i) - base.read(i);
    const size_t row = (first + i) / columns, column = (first + i) % columns;
    float sum = 0;
    for (size_t k = 0; k < rank; ++k) sum += left[row * rank + k] * right[k * columns + column];
    return sum * low_rank.scale;
  }

  void expect(size_t i) {
    const float before = theta.read(i), task = task_vector(i), f = forget.read(i), r = retain.read(i);
    float w = 1;
    if (weighted == Weighted::by_pair) {
      w = rescaling.masked ? weight_of<true>(f, r, rescaling) : weight_of<false>(f, r, rescaling);
    } else if (weighted == Weighted::by_ratio) {
      w = rescaling.masked ? ratio_weight_of<true>(r, rescaling) : ratio_weight_of<false>(r, rescaling);
    }
    Stored rounded({subtract(before, rescaling.lam * w * task)}, theta.dtype);
    const float after = expected[i] = rounded.read(0);
    statistics.sum_weight += w;
    statistics.sum_squared_theta += static_cast<double>(before) * before;
    statistics.sum_squared_change += std::pow(static_cast<double>(after) - before, 2);
    statistics.changed += after - before != 0.0f;
    statistics.nonfinite_out += !is_finite(after);
    statistics.nonfinite_forget += weighted == Weighted::by_pair && !is_finite(f);
    statistics.nonfinite_retain += weighted == Weighted::by_pair && !is_finite(r);
    statistics.invalid_ratio += weighted == Weighted::by_ratio && !(r >= 0);
    statistics.nonzero_task |= task != 0.0f;
  }

  std::vector<float> run(const BlockKernels& kernels, int threads, bool in_place, RescaleStatistics* found) {
    Stored out = theta;
    RescaleArrays arrays{};
    arrays.out = out.data();
    arrays.theta = in_place ? out.data() : theta.data();
    if (of_factors) {
      arrays.low_rank = &low_rank;
    } else {
      arrays.tuned = tuned.data(), arrays.base = base.data();
    }
    if (weighted == Weighted::by_pair) arrays.forget = forget.data();
    if (weighted != Weighted::no) arrays.retain = retain.data();
    arrays.theta_dtype = theta.dtype, arrays.tuned_dtype = tuned.dtype, arrays.base_dtype = base.dtype;
    arrays.forget_dtype = forget.dtype, arrays.retain_dtype = retain.dtype;
    rescaled_subtract(kernels, arrays, rescaling, n, threads, found);
    std::vector<float> values(n);
    for (size_t i = 0; i < n; ++i) values[i] = out.read(i);
    return values;
  }
};

// A sum of float32 sums over blocks, against one in double; both are the same kind of not finite.
bool close(double found, double expected) {
  if (!std::isfinite(expected)) return std::isnan(found) == std::isnan(expected) && !std::isfinite(found);
  return std::fabs(found - expected) <= 1e-5 * std::fabs(expected);
}

bool identical(double a, double b) { return a == b || (a != a && b != b); }

void subtracting(const BlockKernels& kernels, Types types, const Rescaling& rescaling, Task task, size_t n) {
  Subtraction subtraction(types, rescaling, task, n);
  const RescaleStatistics& expected = subtraction.statistics;
  RescaleStatistics alone;
  CHECK(same(subtraction.run(kernels, 1, true, &alone), subtraction.expected));
  CHECK(close(alone.sum_weight, expected.sum_weight));
  CHECK(close(alone.sum_squared_theta, expected.sum_squared_theta));
  CHECK(close(alone.sum_squared_change, expected.sum_squared_change));
  CHECK(alone.changed == expected.changed);
  CHECK(alone.nonfinite_out == expected.nonfinite_out);
  CHECK(alone.nonfinite_forget == expected.nonfinite_forget);
  CHECK(alone.nonfinite_retain == expected.nonfinite_retain);
  CHECK(alone.invalid_ratio == expected.invalid_ratio);
  CHECK(alone.nonzero_task == expected.nonzero_task);
  for (int threads : {2, 5}) {
    RescaleStatistics found;
    CHECK(same(subtraction.run(kernels, threads, false, &found), subtraction.expected));
    CHECK(identical(found.sum_weight, alone.sum_weight));
    CHECK(identical(found.sum_squared_theta, alone.sum_squared_theta));
    CHECK(identical(found.sum_squared_change, alone.sum_squared_change));
    CHECK(found.changed == alone.changed && found.nonfinite_out == alone.nonfinite_out);
    CHECK(found.nonfinite_forget == alone.nonfinite_forget && found.nonfinite_retain == alone.nonfinite_retain);
    CHECK(found.nonzero_task == alone.nonzero_task && found.invalid_ratio == alone.invalid_ratio);
    CHECK(same(subtraction.run(kernels, threads, true, nullptr), subtraction.expected));
  }
}

void subtracting(const BlockKernels& kernels) {
  const DType f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
  const Types mixes[] = {{f32, f32, f32, f32, f32},  {bf16, bf16, bf16, bf16, bf16}, {f16, f16, f16, f16, f16},
                         {bf16, f32, f16, f16, f32}, {f16, bf16, f32, bf16, bf16},   {f32, f16, bf16, f32, f16}};
  const Task tasks[] = {Task::difference, Task::weighted_difference, Task::difference_by_ratio,
                        Task::low_rank,   Task::weighted_low_rank,   Task::low_rank_by_ratio};
  for (const Types& types : mixes) {
    for (Task task : tasks) {
      for (float p : {1.0f, 2.0f, 0.5f, 1.5f}) {
        for (bool masked : {false, true}) {
          const Rescaling rescaling{0.7f, p, 0.5f, 0.6f, masked};
          for (size_t n : {0, 1, 5, 1025}) subtracting(kernels, types, rescaling, task, n);
        }
      }
    }
  }
  for (DType dtype : {f32, bf16, f16}) {  // enough elements for every thread to have some
    for (Task task : {Task::weighted_difference, Task::weighted_low_rank}) {
      subtracting(kernels, {dtype, dtype, dtype, dtype, dtype}, {0.7f, 2.0f, 0.5f, 0.0f, false}, task, 140001);
    }
  }
}

void squaring(const BlockKernels& kernels, DType dtype, size_t d_out, size_t d_in) {
  const std::vector<SampleRows> samples = {{0, 1}, {1, 4}, {4, 4}, {4, 17}};  // one has no row
  Stored a(drawn(17 * d_in, 1), dtype), delta(drawn(17 * d_out, 2), dtype);
  std::vector<float> sums(d_out * d_in), gradients(d_out * d_in);
  const auto run = [&](std::vector<float>& fisher_sums, float* gradient, int threads) {
    const FisherArrays arrays{fisher_sums.data(), gradient,      a.data(), delta.data(), dtype, dtype, d_in, d_out,
                              samples.data(),     samples.size()};
    CHECK(fisher(kernels, arrays, threads));
  };
  run(sums, gradients.data(), 1);
  double error = 0, norm = 0, gradient_error = 0;
  for (size_t i = 0; i < d_out; ++i) {
    for (size_t j = 0; j < d_in; ++j) {
      double expected = 0, gradient = 0;
      for (const SampleRows& rows : samples) {
        double own = 0;
        for (int64_t t = rows.begin; t < rows.end; ++t) {
          own += static_cast<double>(delta.read(t * d_out + i)) * a.read(t * d_in + j);
        }
        expected += own * own;
        gradient += own;
      }
      error += std::pow(sums[i * d_in + j] - expected, 2);
      norm += expected * expected;
      gradient_error = std::fmax(gradient_error, std::fabs(gradients[i * d_in + j] - gradient));
    }
  }
  CHECK(std::sqrt(error) <= 1e-5 * std::sqrt(norm));
  CHECK(gradient_error < 1e-5);
  for (int threads : {2, 3, 8}) {
    std::vector<float> again(d_out * d_in), gradients_again(d_out * d_in);
    run(again, gradients_again.data(), threads);
    CHECK(same(again, sums) && same(gradients_again, gradients));
  }
  std::vector<float> without_gradients(d_out * d_in);
  run(without_gradients, nullptr, 3);
  CHECK(same(without_gradients, sums));
}

void squaring(const BlockKernels& kernels) {
  const size_t sizes[][2] = {{1, 1}, {7, 49}, {130, 9}, {65, 800}};  // d_out, d_in
  for (const auto& size : sizes) {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) squaring(kernels, dtype, size[0], size[1]);
  }
}

// Pieces of a file in any order, some of them twice, on several threads, are as good as the whole.
void hashing(const BlockKernels& kernels) {
  for (size_t size : {1, 1000, 1024, 3000, 4096, 70000, 131072}) {
    std::vector<unsigned char> bytes(size);
    for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<unsigned char>(i * i % 251);
    FileHash::Value whole, pieces;
    FileHash at_once(size);
    CHECK(!at_once.digest(&whole));
    at_once.add(kernels, bytes.data(), 0, size);
    CHECK(at_once.digest(&whole) && at_once.missing().empty());
    for (size_t piece : {7, 100, 1024, 5000}) {
      FileHash hash(size);
      const size_t count = (size + piece - 1) / piece;
      parallel_for(2 * count, 3, [&](size_t k) {
        const size_t begin = (k * 7919) % count * piece, n = size - begin < piece ? size - begin : piece;
        hash.add(kernels, bytes.data() + begin, begin, n);
      });
      for (const auto& [begin, end] : hash.missing()) hash.add(kernels, bytes.data() + begin, begin, end - begin);
      CHECK(hash.digest(&pieces) && pieces == whole);
    }
  }
  FileHash empty(0);
  FileHash::Value value;
  const unsigned char of_nothing[4] = {0xAF, 0x13, 0x49, 0xB9};  // as b3sum prints it
  CHECK(empty.digest(&value) && memcmp(value.data(), of_nothing, 4) == 0);
}

// Reads fill their memory and hash it in passing, up to the first that fails.
void reading(const BlockKernels& kernels) {
  std::vector<unsigned char> bytes(5000), read(bytes.size());
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<unsigned char>(i * i % 251);
  FILE* file = tmpfile();
  CHECK(file != nullptr && fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size() && fflush(file) == 0);
  const int descriptor = fileno(file);
  FileHash whole(bytes.size()), in_passing(bytes.size());
  whole.add(kernels, bytes.data(), 0, bytes.size());
  FileRead first{descriptor, read.data() + 1500, 1500, 3500, 0, 100, false, &in_passing};
  FileRead second{descriptor, read.data(), 0, 1500, 0, 0, true, &in_passing};
  CHECK(!read_files(kernels, {}).has_value());
  CHECK(!read_files(kernels, {first, second}).has_value() && read == bytes);
  FileHash::Value expected, found;
  CHECK(whole.digest(&expected) && in_passing.digest(&found) && found == expected);
  second.begin = 4000;
  first.descriptor = -1;
  const auto ends = read_files(kernels, {second, first}), closed = read_files(kernels, {first, second});
  CHECK(ends.has_value() && ends->number == 0 && ends->error == 0);
  CHECK(closed.has_value() && closed->number == 0 && closed->error == EBADF);
  fclose(file);
}

}  // namespace

int main() {
  every_index_once();
  const BlockKernels* kernels = kernels_named("portable");
  CHECK(kernels != nullptr && kernels_named("no such set") == nullptr);
  accumulating(*kernels);
  subtracting(*kernels);
  squaring(*kernels);
  hashing(*kernels);
  reading(*kernels);
  return finish();
}
