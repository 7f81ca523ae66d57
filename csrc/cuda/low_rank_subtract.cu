// theta - lam w (scale left right): the task vector of a LoRA adapter, made in registers from its factors.
//
// Assumes factors that stay in the caches, and what launch.cuh does of addresses and sizes.
// Bytes: theta and the importances once, out once, no task vector at all. FLOPs: 2 a rank and element, and those of
// rescale.h.

#include "launch.cuh"
#include "operations.h"
#include "weighing.cuh"

namespace perta::cuda {
namespace {

template <Weighted weighted, bool general>
struct LowRankSubtract {
  static constexpr bool by_pair = weighted == Weighted::by_pair, by_ratio = weighted == Weighted::by_ratio;
  static constexpr int arrays = by_pair ? 4 : by_ratio ? 3 : 2;  // out, theta, and the two importances or their ratio

  DType theta_dtype, forget_dtype, retain_dtype;
  LowRank task;
  Weighing<weighted, general> weighing;

  std::array<size_t, arrays> sizes() const {
    const DType dtypes[] = {theta_dtype, theta_dtype, by_ratio ? retain_dtype : forget_dtype, retain_dtype};
    std::array<size_t, arrays> sizes;
    for (int k = 0; k < arrays; ++k) sizes[k] = size_of(dtypes[k]);
    return sizes;
  }

  template <int count>
  __device__ __forceinline__ void at(void* const* data, size_t i) const {
    const Bits<count> theta = fetch<count>(data[1], theta_dtype, i);
    Bits<count> forget, retain;
    if constexpr (by_pair) forget = fetch<count>(data[2], forget_dtype, i);
    if constexpr (weighted != Weighted::no) retain = fetch<count>(data[arrays - 1], retain_dtype, i);
    const float* left[count];
    const float* right[count];
    float sums[count];
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const size_t element = task.first + i + k;
      left[k] = task.left + element / task.columns * task.rank;
      right[k] = task.right + element % task.columns;
      sums[k] = 0.0f;
    }
    // In the order of the rank, as on the CPU, for the same bits.
    for (size_t r = 0; r < task.rank; ++r) {
#pragma unroll
      for (int k = 0; k < count; ++k) sums[k] += left[k][r] * right[k][r * task.columns];
    }
    float result[count];
#pragma unroll
    for (int k = 0; k < count; ++k) {
      float scale = weighing.rescaling.lam;
      if constexpr (by_pair) scale *= weighing.weigh(widen(forget, forget_dtype, k), widen(retain, retain_dtype, k));
      if constexpr (by_ratio) scale *= weighing.weigh(1.0f, widen(retain, retain_dtype, k));
      result[k] = subtract(widen(theta, theta_dtype, k), scale * (task.scale * sums[k]));
    }
    store(data[0], theta_dtype, i, result);
  }
};

template <Weighted weighted, bool general>
const char* run(const RescaleTensor& tensor, const Rescaling& rescaling, void* stream) {
  using Operation = LowRankSubtract<weighted, general>;
  const RescaleArrays& from = tensor.arrays;
  const void* data[] = {from.out, from.theta, Operation::by_ratio ? from.retain : from.forget, from.retain};
  Tensor<Operation::arrays> walked{};
  for (int k = 0; k < Operation::arrays; ++k) walked.data[k] = const_cast<void*>(data[k]);
  walked.n = tensor.n;
  const Operation operation{
      from.theta_dtype, from.forget_dtype, from.retain_dtype, *from.low_rank, {rescaling, power_of(rescaling.p)}};
  return launch(operation, std::vector<Tensor<Operation::arrays>>{walked}, stream);
}

}  // namespace

const char* low_rank_subtract(const RescaleTensor& tensor, const Rescaling& rescaling, void* stream) {
  if (tensor.n == 0) return nullptr;
  const bool general = power_of(rescaling.p) == Power::general;
  switch (weighted_by(tensor.arrays)) {
    case Weighted::by_pair:
      return general ? run<Weighted::by_pair, true>(tensor, rescaling, stream)
                     : run<Weighted::by_pair, false>(tensor, rescaling, stream);
    case Weighted::by_ratio:
      return general ? run<Weighted::by_ratio, true>(tensor, rescaling, stream)
                     : run<Weighted::by_ratio, false>(tensor, rescaling, stream);
    default:
      return run<Weighted::no, false>(tensor, rescaling, stream);
  }
}

}  // namespace perta::cuda
