// What the kernels share: loads and stores by storage type, and the walk over the arrays of many tensors.
//
// An operation is a function object on a few arrays of equal length; it works on one element, or on a group of
// eight by 16-byte loads and stores. The arrays of one tensor are cut into chunks, and blocks take one chunk after
// another, so that one launch serves a large tensor and thousands of small ones alike. The table of tensors travels
// in the kernel's parameters: no memory on the device, nothing to wait for.
//
// Assumes arrays aligned to their elements. Groups need one element at which all arrays of a tensor are at a multiple
// of 16 bytes (see Tensor::head). Tensors without one, and the ends, are done element by element. Any size.
// Bytes and FLOPs: the operation's own.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <vector>

#include "dtype.h"

namespace perta::cuda {

constexpr int threads_per_block = 256;
constexpr int width = 8;  // elements of a group: 16 bytes of a 16-bit type, twice 16 of float32
constexpr size_t chunk = 2 * width * threads_per_block;                     // elements that a block takes at a time
constexpr size_t parameter_bytes = CUDART_VERSION >= 12010 ? 32764 : 4096;  // what a launch takes

// The bits of one element or of a group: one element a word, or two if a group has a 16-bit type. They are fetched
// first and converted afterwards, so that all loads of a thread are in flight together, even if the storage types are
// known only at run time.
template <int count>
struct Bits {
  alignas(count == 1 ? 4 : 16) uint32_t words[count];
};

template <int count>
__device__ __forceinline__ Bits<count> fetch(const void* data, DType dtype, size_t i) {
  const unsigned char* source = static_cast<const unsigned char*>(data) + i * size_of(dtype);
  Bits<count> bits = {};
  if constexpr (count == 1) {
    bits.words[0] =
        dtype == DType::f32 ? *reinterpret_cast<const uint32_t*>(source) : *reinterpret_cast<const uint16_t*>(source);
  } else {
    static_assert(count == width);
    const uint4* quads = reinterpret_cast<const uint4*>(source);
    uint4* loaded = reinterpret_cast<uint4*>(bits.words);
    loaded[0] = quads[0];
    if (dtype == DType::f32) loaded[1] = quads[1];
  }
  return bits;
}

template <int count>
__device__ __forceinline__ float widen(const Bits<count>& bits, DType dtype, int k) {
  if (dtype == DType::f32) return float_of(bits.words[k]);
  const uint16_t half = static_cast<uint16_t>(bits.words[k / 2] >> (k % 2 * 16));
  return dtype == DType::bf16 ? bf16_to_float(half) : f16_to_float(half);
}

template <int count>
__device__ __forceinline__ void store(void* data, DType dtype, size_t i, const float (&values)[count]) {
  unsigned char* target = static_cast<unsigned char*>(data) + i * size_of(dtype);
  Bits<count> bits = {};
#pragma unroll
  for (int k = 0; k < count; ++k) {
    if (dtype == DType::f32) {
      bits.words[k] = bits_of(values[k]);
    } else {
      const uint32_t half = dtype == DType::bf16 ? float_to_bf16(values[k]) : float_to_f16(values[k]);
      bits.words[k / 2] |= half << (k % 2 * 16);
    }
  }
  if constexpr (count == 1) {
    if (dtype == DType::f32) {
      *reinterpret_cast<uint32_t*>(target) = bits.words[0];
    } else {
      *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(bits.words[0]);
    }
  } else {
    uint4* quads = reinterpret_cast<uint4*>(target);
    const uint4* finished = reinterpret_cast<const uint4*>(bits.words);
    quads[0] = finished[0];
    if (dtype == DType::f32) quads[1] = finished[1];
  }
}

template <int arrays>
struct Tensor {
  void* data[arrays];
  size_t n;
  uint32_t first_chunk = 0;  // of this tensor, counted over the table
  int32_t head = -1;         // elements before the first at which every array is at a multiple of 16 bytes; -1: none
};

template <int arrays, int capacity>
struct Table {
  Tensor<arrays> tensors[capacity];
  uint32_t count = 0;
  uint32_t chunks = 0;
};

template <class Operation, int capacity>
__global__ void __launch_bounds__(threads_per_block)
    walk(const __grid_constant__ Table<Operation::arrays, capacity> table,
         const __grid_constant__ Operation operation) {
  for (uint32_t number = blockIdx.x; number < table.chunks; number += gridDim.x) {
    uint32_t low = 0, high = table.count;  // the chunk's tensor: the last with first_chunk <= number
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      (table.tensors[middle].first_chunk <= number ? low : high) = middle;
    }
    const Tensor<Operation::arrays>& tensor = table.tensors[low];
    const size_t head = tensor.head > 0 ? tensor.head : 0;
    const size_t begin = head + (number - tensor.first_chunk) * chunk;
    const size_t end = begin + chunk < tensor.n ? begin + chunk : tensor.n;
    const size_t grouped = tensor.head < 0 ? begin : begin + (end - begin) / width * width;
    for (size_t i = begin + threadIdx.x * width; i < grouped; i += threads_per_block * width) {
      operation.template at<width>(tensor.data, i);
    }
    for (size_t i = grouped + threadIdx.x; i < end; i += threads_per_block) {
      operation.template at<1>(tensor.data, i);
    }
    if (number == tensor.first_chunk && threadIdx.x < head) operation.template at<1>(tensor.data, threadIdx.x);
  }
}

// See Tensor::head. sizes: bytes of an element of each array.
template <size_t arrays>
int32_t head_of(void* const* data, const std::array<size_t, arrays>& sizes, size_t n) {
  for (size_t head = 0; head < width && head < n; ++head) {
    bool aligned = true;
    for (size_t k = 0; k < arrays; ++k) {
      aligned &= (reinterpret_cast<uintptr_t>(data[k]) + head * sizes[k]) % 16 == 0;
    }
    if (aligned) return static_cast<int32_t>(head);
  }
  return -1;
}

template <class Operation, int capacity>
cudaError_t launch_table(const Operation& operation, const Tensor<Operation::arrays>* tensors, size_t count,
                         cudaStream_t stream) {
  Table<Operation::arrays, capacity> table;
  table.count = static_cast<uint32_t>(count);
  for (size_t k = 0; k < count; ++k) {
    Tensor<Operation::arrays>& tensor = table.tensors[k] = tensors[k];
    tensor.head = head_of(tensor.data, operation.sizes(), tensor.n);
    tensor.first_chunk = table.chunks;
    const size_t after_head = tensor.n - (tensor.head > 0 ? tensor.head : 0);
    table.chunks += static_cast<uint32_t>((after_head + chunk - 1) / chunk);
  }
  const auto kernel = walk<Operation, capacity>;
  static const int resident = [&] {  // blocks that a multiprocessor holds
    int blocks = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads_per_block, 0);
    return std::max(blocks, 1);
  }();
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::min(table.chunks, static_cast<uint32_t>(std::max(processors, 1) * resident)));
  config.blockDim = dim3(threads_per_block);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, table, operation);
}

// Runs the operation on every tensor, none of them empty. Returns nullptr, or CUDA's description of what went wrong.
template <class Operation>
const char* launch(const Operation& operation, const std::vector<Tensor<Operation::arrays>>& tensors,
                   void* stream_pointer) {
  constexpr size_t capacity =
      (parameter_bytes - sizeof(Operation) - 64) / sizeof(Tensor<Operation::arrays>);  // 64: the rest of the table
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  for (size_t first = 0; first < tensors.size(); first += capacity) {
    const size_t count = std::min(capacity, tensors.size() - first);
    const cudaError_t error = count == 1 ? launch_table<Operation, 1>(operation, &tensors[first], count, stream)
                                         : launch_table<Operation, capacity>(operation, &tensors[first], count, stream);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  return nullptr;
}

}  // namespace perta::cuda
