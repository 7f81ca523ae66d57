// The operations on whole arrays against plain loops: odd sizes, odd addresses, several threads.
#include <atomic>
#include <cmath>
#include <vector>

#include "check.h"
#include "operations.h"
#include "parallel.h"

using namespace perta;

namespace {

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

void accumulating(const BlockKernels& kernels) {
  for (size_t n : {0, 1, 3, 1023, 1025, 300001}) {
    for (bool squared : {false, true}) {
      std::vector<float> sums = drawn(n, 1), expected = sums;
      const std::vector<float> gradient = drawn(n, 2);
      for (size_t i = 0; i < n; ++i) expected[i] += squared ? gradient[i] * gradient[i] : gradient[i];
      accumulate(kernels, sums.data(), gradient.data(), DType::f32, squared, n, 3);
      CHECK(sums == expected);
      std::vector<unsigned char> bytes(2 * n + 1);  // bfloat16, at an odd address
      for (size_t i = 0; i < n; ++i) {
        const uint16_t half = float_to_bf16(gradient[i]);
        memcpy(bytes.data() + 1 + 2 * i, &half, 2);
        const float value = bf16_to_float(half);
        expected[i] += squared ? value * value : value;
      }
      accumulate(kernels, sums.data(), bytes.data() + 1, DType::bf16, squared, n, 3);
      CHECK(sums == expected);
    }
  }
}

void subtracting(const BlockKernels& kernels) {
  const Rescaling rescaling{0.7f, 2.0f, 0.5f, 0.0f, false};
  for (size_t n : {0, 1, 5, 1025, 140001}) {
    std::vector<float> theta = drawn(n, 1), expected = theta;
    const std::vector<float> tuned = drawn(n, 2), base = drawn(n, 3), forget = drawn(n, 4), retain = drawn(n, 5);
    for (size_t i = 0; i < n; ++i) {
      const float w = weight<Power::two, false>(forget[i], retain[i], rescaling);
      expected[i] = subtract(theta[i], rescaling.lam * w * (tuned[i] - base[i]));
    }
    RescaleArrays arrays{};
    arrays.out = theta.data();
    arrays.theta = theta.data();
    arrays.tuned = tuned.data();
    arrays.base = base.data();
    arrays.forget = forget.data();
    arrays.retain = retain.data();
    RescaleStatistics statistics;
    rescaled_subtract(kernels, arrays, rescaling, n, 4, &statistics);
    CHECK(theta == expected);
    CHECK(statistics.nonfinite_out == 0 && statistics.nonzero_task == (n > 0));
  }
}

void squaring(const BlockKernels& kernels) {
  const size_t sizes[][2] = {{1, 1}, {7, 49}, {130, 9}, {65, 800}};  // d_out, d_in
  for (const auto& size : sizes) {
    const size_t d_out = size[0], d_in = size[1];
    const std::vector<SampleRows> samples = {{0, 1}, {1, 4}, {4, 4}, {4, 17}};  // one has no row
    const std::vector<float> a = drawn(17 * d_in, 1), delta = drawn(17 * d_out, 2);
    std::vector<float> sums(d_out * d_in), gradients(d_out * d_in);
    const FisherArrays arrays{sums.data(), gradients.data(), a.data(),      delta.data(), DType::f32, DType::f32, d_in,
                              d_out,       samples.data(),   samples.size()};
    CHECK(fisher(kernels, arrays, 3));
    double error = 0, norm = 0, gradient_error = 0;
    for (size_t i = 0; i < d_out; ++i) {
      for (size_t j = 0; j < d_in; ++j) {
        double expected = 0, gradient = 0;
        for (const SampleRows& rows : samples) {
          double own = 0;
          for (int64_t t = rows.begin; t < rows.end; ++t) {
            own += static_cast<double>(delta[t * d_out + i]) * a[t * d_in + j];
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
  }
}

}  // namespace

int main() {
  every_index_once();
  const BlockKernels* kernels = kernels_named("portable");
  CHECK(kernels != nullptr && kernels_named("no such set") == nullptr);
  accumulating(*kernels);
  subtracting(*kernels);
  squaring(*kernels);
  return finish();
}
