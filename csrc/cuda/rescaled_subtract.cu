// theta - lam w (theta_f - theta_0), the formula of rescale.h.
//
// Assumes what launch.cuh does of addresses and sizes.
// Bytes: each input once, out once. FLOPs: those of rescale.h.

#include <map>
#include <utility>

#include "launch.cuh"
#include "operations.h"
#include "weighing.cuh"

namespace perta::cuda {
namespace {

// The common storage types are known when the kernel is compiled, any other mix when it runs.
template <DType weights_dtype, DType importance_dtype>
struct FixedTypes {
  static constexpr DType theta = weights_dtype, tuned = weights_dtype, base = weights_dtype;
  static constexpr DType forget = importance_dtype, retain = importance_dtype;
};

struct AnyTypes {
  DType theta, tuned, base, forget, retain;
};

template <class Types, bool weighted, bool general>
struct RescaledSubtract {
  static constexpr int arrays = weighted ? 6 : 4;  // out, theta, tuned, base, and the two importances

  Types types;
  Weighing<general> weighing;

  std::array<size_t, arrays> sizes() const {
    const DType dtypes[] = {types.theta, types.theta, types.tuned, types.base, types.forget, types.retain};
    std::array<size_t, arrays> sizes;
    for (int k = 0; k < arrays; ++k) sizes[k] = size_of(dtypes[k]);
    return sizes;
  }

  template <int count>
  __device__ __forceinline__ void at(void* const* data, size_t i) const {
    const Bits<count> theta = fetch<count>(data[1], types.theta, i);
    const Bits<count> tuned = fetch<count>(data[2], types.tuned, i);
    const Bits<count> base = fetch<count>(data[3], types.base, i);
    Bits<count> forget, retain;
    if constexpr (weighted) {
      forget = fetch<count>(data[4], types.forget, i);
      retain = fetch<count>(data[5], types.retain, i);
    }
    float result[count];
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const float task = widen(tuned, types.tuned, k) - widen(base, types.base, k);
      float scale = weighing.rescaling.lam;
      if constexpr (weighted) {
        scale *= weighing.weigh(widen(forget, types.forget, k), widen(retain, types.retain, k));
      }
      result[k] = subtract(widen(theta, types.theta, k), scale * task);
    }
    store(data[0], types.theta, i, result);
  }
};

using Dtypes = std::array<DType, 5>;  // theta, tuned, base, forget, retain

template <class Types, bool weighted, bool general = false>
const char* run(Types types, const Rescaling& rescaling, const std::vector<RescaleTensor>& all, void* stream) {
  using Operation = RescaledSubtract<Types, weighted, general>;
  std::vector<Tensor<Operation::arrays>> tensors;
  for (const RescaleTensor& tensor : all) {
    const RescaleArrays& from = tensor.arrays;
    const void* data[] = {from.out, from.theta, from.tuned, from.base, from.forget, from.retain};
    Tensor<Operation::arrays> walked{};
    for (int k = 0; k < Operation::arrays; ++k) walked.data[k] = const_cast<void*>(data[k]);
    walked.n = tensor.n;
    tensors.push_back(walked);
  }
  return launch(Operation{types, {rescaling, power_of(rescaling.p)}}, tensors, stream);
}

template <DType weights, DType importance>
bool all_are(const Dtypes& dtypes) {
  return dtypes == Dtypes{weights, weights, weights, importance, importance};
}

const char* run_types(bool weighted, const Dtypes& dtypes, const Rescaling& rescaling,
                      const std::vector<RescaleTensor>& tensors, void* stream) {
  constexpr DType f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
  const AnyTypes any{dtypes[0], dtypes[1], dtypes[2], dtypes[3], dtypes[4]};
  if (!weighted) {
    if (all_are<bf16, f32>(dtypes)) return run<FixedTypes<bf16, f32>, false>({}, rescaling, tensors, stream);
    if (all_are<f32, f32>(dtypes)) return run<FixedTypes<f32, f32>, false>({}, rescaling, tensors, stream);
    if (all_are<f16, f32>(dtypes)) return run<FixedTypes<f16, f32>, false>({}, rescaling, tensors, stream);
    return run<AnyTypes, false>(any, rescaling, tensors, stream);
  }
  if (power_of(rescaling.p) == Power::general) return run<AnyTypes, true, true>(any, rescaling, tensors, stream);
  if (all_are<bf16, f32>(dtypes)) return run<FixedTypes<bf16, f32>, true>({}, rescaling, tensors, stream);
  if (all_are<bf16, bf16>(dtypes)) return run<FixedTypes<bf16, bf16>, true>({}, rescaling, tensors, stream);
  if (all_are<f32, f32>(dtypes)) return run<FixedTypes<f32, f32>, true>({}, rescaling, tensors, stream);
  if (all_are<f16, f16>(dtypes)) return run<FixedTypes<f16, f16>, true>({}, rescaling, tensors, stream);
  return run<AnyTypes, true>(any, rescaling, tensors, stream);
}

}  // namespace

const char* rescaled_subtract(const std::vector<RescaleTensor>& tensors, const Rescaling& rescaling, void* stream) {
  // Tensors with the same types, all with weights or all without, share a launch. The type of an absent array is
  // ignored.
  std::map<std::pair<bool, Dtypes>, std::vector<RescaleTensor>> groups;
  for (const RescaleTensor& tensor : tensors) {
    if (tensor.n == 0) continue;
    const RescaleArrays& from = tensor.arrays;
    const bool weighted = has_weights(from);
    const DType forget = weighted ? from.forget_dtype : DType::f32;
    const DType retain = weighted ? from.retain_dtype : DType::f32;
    groups[{weighted, {from.theta_dtype, from.tuned_dtype, from.base_dtype, forget, retain}}].push_back(tensor);
  }
  for (const auto& [kind, group] : groups) {
    const char* error = run_types(kind.first, kind.second, rescaling, group, stream);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace perta::cuda
