// accumulator += gradient, or += gradient^2, in float32, the square rounded before it is added.
//
// Assumes what launch.cuh does of addresses and sizes.
// Bytes: 8 an element of the accumulator, and the gradient's once. FLOPs: 1 an element, 2 with the square.

#include "launch.cuh"
#include "operations.h"

namespace perta::cuda {
namespace {

template <DType gradient_dtype, bool squared>
struct Accumulate {
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
const char* accumulate_type(const std::vector<AccumulateTensor>& all, bool squared, void* stream) {
  std::vector<Tensor<2>> tensors;
  for (const AccumulateTensor& tensor : all) {
    if (tensor.n > 0 && tensor.gradient_dtype == gradient_dtype) {
      tensors.push_back({{tensor.accumulator, const_cast<void*>(tensor.gradient)}, tensor.n});
    }
  }
  return squared ? launch(Accumulate<gradient_dtype, true>{}, tensors, stream)
                 : launch(Accumulate<gradient_dtype, false>{}, tensors, stream);
}

}  // namespace

const char* accumulate(const std::vector<AccumulateTensor>& tensors, bool squared, void* stream) {
  const char* error = accumulate_type<DType::f32>(tensors, squared, stream);
  if (error == nullptr) error = accumulate_type<DType::bf16>(tensors, squared, stream);
  if (error == nullptr) error = accumulate_type<DType::f16>(tensors, squared, stream);
  return error;
}

}  // namespace perta::cuda
