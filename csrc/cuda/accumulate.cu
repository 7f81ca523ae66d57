// accumulator += gradient, or += gradient^2, in float32. Moves 8 bytes an element and those of the gradient.

#include "launch.cuh"
#include "operations.h"

namespace perta::cuda {
namespace {

template <DType gradient_dtype, bool squared>
struct Fold {
  static constexpr int arrays = 2;

  std::array<size_t, arrays> sizes() const { return {size_of(DType::f32), size_of(gradient_dtype)}; }

  template <int count>
  __device__ __forceinline__ void at(void* const* data, size_t i) const {
    const Bits<count> accumulator = fetch<count>(data[0], DType::f32, i);
    const Bits<count> gradient = fetch<count>(data[1], gradient_dtype, i);
    float sums[count];
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const float g = widen(gradient, gradient_dtype, k);
      sums[k] = widen(accumulator, DType::f32, k) + (squared ? g * g : g);
    }
    store(data[0], DType::f32, i, sums);
  }
};

template <DType gradient_dtype>
const char* fold_type(const std::vector<FoldTensor>& all, bool squared, void* stream) {
  std::vector<Tensor<2>> tensors;
  for (const FoldTensor& each : all) {
    if (each.n > 0 && each.gradient_dtype == gradient_dtype) {
      tensors.push_back({{each.accumulator, const_cast<void*>(each.gradient)}, each.n});
    }
  }
  return squared ? launch(Fold<gradient_dtype, true>{}, tensors, stream)
                 : launch(Fold<gradient_dtype, false>{}, tensors, stream);
}

}  // namespace

const char* fold(const std::vector<FoldTensor>& tensors, bool squared, void* stream) {
  const char* error = fold_type<DType::f32>(tensors, squared, stream);
  if (error == nullptr) error = fold_type<DType::bf16>(tensors, squared, stream);
  if (error == nullptr) error = fold_type<DType::f16>(tensors, squared, stream);
  return error;
}

}  // namespace perta::cuda
