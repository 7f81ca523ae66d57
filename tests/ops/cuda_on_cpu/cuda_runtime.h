// What csrc/cuda needs of the CUDA runtime, on the CPU: a launch runs every thread of every block in turn. That is
// all there is to kernels without barriers and shared memory, so their indexing and arithmetic can be tested here.
#pragma once

#include <cstdint>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct dim3 {
  uint32_t x = 1;
  dim3() = default;
  explicit dim3(uint32_t x) : x(x) {}
};

inline dim3 gridDim, blockIdx, threadIdx;
inline int launches = 0;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

// A device of three multiprocessors that hold one block each, so that blocks must stride.
inline void cudaGetDevice(int* device) { *device = 0; }
inline void cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { *value = 3; }
template <class Kernel>
void cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, int) {
  *blocks = 1;
}
inline const char* cudaGetErrorString(cudaError_t) { return "failed"; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  ++launches;
  gridDim = config->gridDim;
  for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < config->blockDim.x; ++threadIdx.x) kernel(arguments...);
  }
  return cudaSuccess;
}
