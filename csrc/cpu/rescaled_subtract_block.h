// What is compiled once per instruction set: the work on a run of elements, on one thread.
#pragma once

#include "fisher_block.h"
#include "rescale.h"

namespace perta {

// A task vector of which only factors are stored: scale * left * right, as of a LoRA adapter.
struct LowRank {
  const float* left;   // (rows, rank)
  const float* right;  // (rank, columns)
  size_t rank;
  size_t columns;
  float scale;
  size_t first;  // element of the matrix, row by row, at which the other arrays begin
};

struct RescaleArrays {
  void* out;  // may be theta itself, else overlaps nothing
  const void* theta;
  const void* tuned;
  const void* base;
  const void* forget;  // nullptr when not weighted
  const void* retain;
  DType theta_dtype;  // also that of out
  DType tuned_dtype;
  DType base_dtype;
  DType forget_dtype;
  DType retain_dtype;
  const LowRank* low_rank = nullptr;  // the task vector, if tuned and base are not read for it
};

struct RescaleStatistics {
  double sum_weight = 0;          // of w
  double sum_squared_theta = 0;   // of theta^2, before
  double sum_squared_change = 0;  // of (out - theta)^2, after rounding
  int64_t changed = 0;            // elements whose value differs after rounding
  int64_t nonfinite_out = 0;      // NaN or Inf in out
  int64_t nonfinite_forget = 0;   // NaN or Inf in I_f
  int64_t nonfinite_retain = 0;   // NaN or Inf in I_r
  bool nonzero_task = false;      // some element has theta_f != theta_0
};

struct BlockKernels {
  const char* name;
  FisherKernel fisher;
  void (*rescaled_subtract)(const RescaleArrays&, const RescaleOptions&, size_t begin, size_t end,
                            RescaleStatistics*);  // nullptr: do not count
  void (*fold)(float* accumulator, const void* gradient, DType dtype, bool squared, size_t begin, size_t end);
};

// The kernels of the widest instruction set that this processor runs, or of the one asked for by name
// (portable, avx2, avx512); nullptr if it is unknown here or the processor lacks it.
const BlockKernels* best_kernels();
const BlockKernels* kernels_named(const char* name);

}  // namespace perta
