// What the per-sample Fisher of a linear map is given, and how its kernel divides the work.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace perta {

// Rows [begin, end) of both inputs belong to one sample.
struct SampleRows {
  int64_t begin;
  int64_t end;
};

struct FisherArrays {
  float* fisher;                 // (d_out, d_in), += sum over samples of (delta_n^T a_n)^2
  float* gradient;               // (d_out, d_in), += sum over samples of delta_n^T a_n; nullptr: not wanted
  const void* activations;       // (rows, d_in)
  const void* output_gradients;  // (rows, d_out)
  DType activations_dtype;
  DType output_gradients_dtype;
  size_t d_in;
  size_t d_out;
  const SampleRows* samples;
  size_t sample_count;
};

// The part of F that one call works on: rows [row, row_end), columns [column, column_end).
struct FisherRegion {
  size_t row;
  size_t row_end;
  size_t column;
  size_t column_end;
};

// Samples are packed in batches of about this many tokens, so that what is packed stays in the second-level cache;
// a longer sample is a batch of its own.
constexpr size_t fisher_batch_tokens = 512;
constexpr size_t largest_tile_rows = 8, largest_tile_columns = 48;  // over all instruction sets

// All samples' contributions to one region, on one thread. scratch: for the packed rows and columns, fit for a batch,
// (region's rows, rounded up to a tile + largest_tile_columns) floats a token.
using FisherBlock = void(const FisherArrays&, FisherRegion, float* scratch);

}  // namespace perta
