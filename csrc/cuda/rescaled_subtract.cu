// theta - lam w (theta_f - theta_0), the formula of rescale.h. Moves each input byte once and each output byte once.

#include <map>

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
      float scale = weighing.options.lam;
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
const char* run(Types types, const RescaleOptions& options, const std::vector<RescaleTensor>& all, void* stream) {
  using Operation = RescaledSubtract<Types, weighted, general>;
  std::vector<Tensor<Operation::arrays>> tensors;
  for (const RescaleTensor& each : all) {
    const RescaleArrays& from = each.arrays;
    const void* data[] = {from.out, from.theta, from.tuned, from.base, from.forget, from.retain};
    Tensor<Operation::arrays> tensor{};
    for (int k = 0; k < Operation::arrays; ++k) tensor.data[k] = const_cast<void*>(data[k]);
    tensor.n = each.n;
    tensors.push_back(tensor);
  }
  return launch(Operation{types, {options, power_of(options.p)}}, tensors, stream);
}

template <DType weights, DType importance>
bool all_are(const Dtypes& dtypes) {
  return dtypes == Dtypes{weights, weights, weights, importance, importance};
}

const char* run_types(const Dtypes& dtypes, const RescaleOptions& options, const std::vector<RescaleTensor>& tensors,
                      void* stream) {
  constexpr DType f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
  const AnyTypes any{dtypes[0], dtypes[1], dtypes[2], dtypes[3], dtypes[4]};
  if (!options.weighted) {
    if (all_are<bf16, f32>(dtypes)) return run<FixedTypes<bf16, f32>, false>({}, options, tensors, stream);
    if (all_are<f32, f32>(dtypes)) return run<FixedTypes<f32, f32>, false>({}, options, tensors, stream);
    if (all_are<f16, f32>(dtypes)) return run<FixedTypes<f16, f32>, false>({}, options, tensors, stream);
    return run<AnyTypes, false>(any, options, tensors, stream);
  }
  if (power_of(options.p) == Power::general) return run<AnyTypes, true, true>(any, options, tensors, stream);
  if (all_are<bf16, f32>(dtypes)) return run<FixedTypes<bf16, f32>, true>({}, options, tensors, stream);
  if (all_are<bf16, bf16>(dtypes)) return run<FixedTypes<bf16, bf16>, true>({}, options, tensors, stream);
  if (all_are<f32, f32>(dtypes)) return run<FixedTypes<f32, f32>, true>({}, options, tensors, stream);
  if (all_are<f16, f16>(dtypes)) return run<FixedTypes<f16, f16>, true>({}, options, tensors, stream);
  return run<AnyTypes, true>(any, options, tensors, stream);
}

}  // namespace

const char* rescaled_subtract(const std::vector<RescaleTensor>& tensors, const RescaleOptions& options,
                              void* stream) {
  std::map<Dtypes, std::vector<RescaleTensor>> by_types;
  for (const RescaleTensor& each : tensors) {
    const RescaleArrays& from = each.arrays;
    const DType forget = options.weighted ? from.forget_dtype : DType::f32;
    const DType retain = options.weighted ? from.retain_dtype : DType::f32;
    if (each.n > 0) {
      by_types[{from.theta_dtype, from.tuned_dtype, from.base_dtype, forget, retain}].push_back(each);
    }
  }
  for (const auto& [dtypes, group] : by_types) {
    const char* error = run_types(dtypes, options, group, stream);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace perta::cuda
