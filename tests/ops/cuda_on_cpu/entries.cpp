// The operations of csrc/cuda on lists of numbers, for ctypes.

#include "cuda_runtime.h"
#include "operations.h"

namespace {

void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

}  // namespace

// addresses: six a tensor (out, theta, tuned, base, forget, retain); dtypes: five.
extern "C" const char* rescaled_subtract(size_t tensors, const uint64_t* addresses, const int* dtypes,
                                         const size_t* counts, const perta::Rescaling* rescaling) {
  std::vector<perta::cuda::RescaleTensor> all;
  for (size_t k = 0; k < tensors; ++k, addresses += 6, dtypes += 5) {
    const auto dtype = [&](int i) { return static_cast<perta::DType>(dtypes[i]); };
    all.push_back({{pointer(addresses[0]), pointer(addresses[1]), pointer(addresses[2]), pointer(addresses[3]),
                    pointer(addresses[4]), pointer(addresses[5]), dtype(0), dtype(1), dtype(2), dtype(3), dtype(4)},
                   counts[k]});
  }
  return perta::cuda::rescaled_subtract(all, *rescaling, nullptr);
}

// addresses: out, theta, left, right, forget, retain; dtypes: five, as above.
extern "C" const char* low_rank_subtract(const uint64_t* addresses, const int* dtypes, size_t count, size_t rank,
                                         size_t columns, float scale, const perta::Rescaling* rescaling) {
  const auto dtype = [&](int i) { return static_cast<perta::DType>(dtypes[i]); };
  const perta::LowRank task{static_cast<const float*>(pointer(addresses[2])),
                            static_cast<const float*>(pointer(addresses[3])), rank, columns, scale, 0};
  const perta::RescaleArrays arrays{pointer(addresses[0]), pointer(addresses[1]), nullptr, nullptr,
                                    pointer(addresses[4]), pointer(addresses[5]), dtype(0), dtype(1), dtype(2),
                                    dtype(3), dtype(4), &task};
  return perta::cuda::low_rank_subtract({arrays, count}, *rescaling, nullptr);
}

// addresses: two a tensor (accumulator, gradient); dtypes: the gradient's.
extern "C" const char* accumulate(size_t tensors, const uint64_t* addresses, const int* dtypes, const size_t* counts,
                                  bool squared) {
  std::vector<perta::cuda::AccumulateTensor> all;
  for (size_t k = 0; k < tensors; ++k, addresses += 2) {
    all.push_back({static_cast<float*>(pointer(addresses[0])), pointer(addresses[1]),
                   static_cast<perta::DType>(dtypes[k]), counts[k]});
  }
  return perta::cuda::accumulate(all, squared, nullptr);
}

extern "C" int launch_count() { return launches; }
