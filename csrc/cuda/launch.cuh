// What the kernels share: loads and stores by storage type, and the size of a grid.
#pragma once

#include <cuda_runtime.h>

#include "dtype.h"

namespace perta::cuda {

constexpr int threads_per_block = 256;

__device__ __forceinline__ float load(const void* data, DType dtype, size_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == DType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

__device__ __forceinline__ void store(void* data, DType dtype, size_t i, float value) {
  if (dtype == DType::f32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] = dtype == DType::bf16 ? float_to_bf16(value) : float_to_f16(value);
  }
}

// Enough blocks to fill any device; the kernels stride over the rest.
inline unsigned blocks_for(size_t n) {
  const size_t blocks = (n + threads_per_block - 1) / threads_per_block;
  return static_cast<unsigned>(blocks < 65535 ? blocks : 65535);
}

inline const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace perta::cuda
