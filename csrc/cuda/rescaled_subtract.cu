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

template <class Types, Weighted weighted, bool general>
struct RescaledSubtract {
  static constexpr bool by_pair = weighted == Weighted::by_pair, by_ratio = weighted == Weighted::by_ratio;
  // out, theta, tuned, base, and the two importances or their ratio
  static constexpr int arrays = by_pair ? 6 : by_ratio ? 5 : 4;

  Types types;
  Weighing<weighted, general> weighing;

  std::array<size_t, arrays> sizes() const {
    const DType fifth = by_ratio ? types.retain : types.forget;
    const DType dtypes[] = {types.theta, types.theta, types.tuned, types.base, fifth, types.retain};
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
    if constexpr (by_pair) forget = fetch<count>(data[4], types.forget, i);
    if constexpr (weighted != Weighted::no) retain = fetch<count>(data[arrays - 1], types.retain, i);
    float result[count];
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const float task = widen(tuned, types.tuned, k) - widen(base, types.base, k);
      float scale = weighing.rescaling.lam;
      if constexpr (by_pair) {
        scale *= weighing.weigh(widen(forget, types.forget, k), widen(retain, types.retain, k));
      } else if constexpr (by_ratio) {
        scale *= weighing.weigh(1.0f, widen(retain, types.retain, k));
      }
      result[k] = subtract(widen(theta, types.theta, k), scale * task);
    }
    store(data[0], types.theta, i, result);
  }
};

using Dtypes = std::array<DType, 5>;  // theta, tuned, base, forget, retain

template <class Types, Weighted weighted, bool general = false>
const char* run(Types types, const Rescaling& rescaling, const std::vector<RescaleTensor>& all, void* stream) {
  using Operation = RescaledSubtract<Types, weighted, general>;
  std::vector<Tensor<Operation::arrays>> tensors;
  for (const RescaleTensor& tensor : all) {
    const RescaleArrays& from = tensor.arrays;
    const void* fifth = weighted == Weighted::by_ratio ? from.retain : from.forget;
    const void* data[] = {from.out, from.theta, from.tuned, from.base, fifth, from.retain};
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

constexpr DType f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;

AnyTypes any_types(const Dtypes& dtypes) { return {dtypes[0], dtypes[1], dtypes[2], dtypes[3], dtypes[4]}; }

template <Weighted weighted>
const char* run_weighted(const Dtypes& dtypes, const Rescaling& rescaling, const std::vector<RescaleTensor>& tensors,
                         void* stream) {
  const AnyTypes any = any_types(dtypes);
  if (power_of(rescaling.p) == Power::general) return run<AnyTypes, weighted, true>(any, rescaling, tensors, stream);
  if (all_are<bf16, f32>(dtypes)) return run<FixedTypes<bf16, f32>, weighted>({}, rescaling, tensors, stream);
  if (all_are<bf16, bf16>(dtypes)) return run<FixedTypes<bf16, bf16>, weighted>({}, rescaling, tensors, stream);
  if (all_are<f32, f32>(dtypes)) return run<FixedTypes<f32, f32>, weighted>({}, rescaling, tensors, stream);
  if (all_are<f16, f16>(dtypes)) return run<FixedTypes<f16, f16>, weighted>({}, rescaling, tensors, stream);
  return run<AnyTypes, weighted>(any, rescaling, tensors, stream);
}

const char* run_types(Weighted weighted, const Dtypes& dtypes, const Rescaling& rescaling,
                      const std::vector<RescaleTensor>& tensors, void* stream) {
  if (weighted == Weighted::by_pair) return run_weighted<Weighted::by_pair>(dtypes, rescaling, tensors, stream);
  if (weighted == Weighted::by_ratio) return run_weighted<Weighted::by_ratio>(dtypes, rescaling, tensors, stream);
  constexpr Weighted no = Weighted::no;
  if (all_are<bf16, f32>(dtypes)) return run<FixedTypes<bf16, f32>, no>({}, rescaling, tensors, stream);
  if (all_are<f32, f32>(dtypes)) return run<FixedTypes<f32, f32>, no>({}, rescaling, tensors, stream);
  if (all_are<f16, f32>(dtypes)) return run<FixedTypes<f16, f32>, no>({}, rescaling, tensors, stream);
  return run<AnyTypes, no>(any_types(dtypes), rescaling, tensors, stream);
}

}  // namespace

const char* rescaled_subtract(const std::vector<RescaleTensor>& tensors, const Rescaling& rescaling, void* stream) {
  // Tensors with the same types, weighted by the same, share a launch. The type of an absent array is ignored.
  std::map<std::pair<Weighted, Dtypes>, std::vector<RescaleTensor>> groups;
  for (const RescaleTensor& tensor : tensors) {
    if (tensor.n == 0) continue;
    const RescaleArrays& from = tensor.arrays;
    const Weighted weighted = weighted_by(from);
    const DType retain = weighted == Weighted::no ? DType::f32 : from.retain_dtype;
    const DType forget = weighted == Weighted::by_pair ? from.forget_dtype : retain;
    groups[{weighted, {from.theta_dtype, from.tuned_dtype, from.base_dtype, forget, retain}}].push_back(tensor);
  }
  for (const auto& [kind, group] : groups) {
    const char* error = run_types(kind.first, kind.second, rescaling, group, stream);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace perta::cuda
