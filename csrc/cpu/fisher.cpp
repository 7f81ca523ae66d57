// F += sum over samples of (delta_n^T a_n)^2 over threads, block by block of F. Formula, bytes and FLOPs:
// fisher_block.cpp.

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "operations.h"
#include "parallel.h"

namespace perta {

namespace {

// A block's packed rows are reused for all its columns, and its packed columns for all its rows.
constexpr size_t most_rows = 256, fewest_rows = 64, block_columns = 768;

size_t parts(size_t whole, size_t part) { return (whole + part - 1) / part; }

// Kept by each thread for its next block: fresh memory would cost a page fault for each page of each block.
// nullptr if there is not enough memory.
float* scratch_of_this_thread(size_t size) {
  static thread_local std::unique_ptr<float[]> kept;
  static thread_local size_t kept_size = 0;
  if (kept_size < size) {
    kept.reset(new (std::nothrow) float[size]);
    kept_size = kept == nullptr ? 0 : size;
  }
  return kept.get();
}

}  // namespace

bool fisher(const BlockKernels& kernels, const FisherArrays& arrays, int threads) {
  const size_t across = parts(arrays.d_in, block_columns);
  // Blocks of equal height, and some for every thread to choose from.
  const size_t wanted = std::max(parts(arrays.d_out, most_rows), parts(2 * static_cast<size_t>(threads), across));
  const size_t height = std::max(parts(arrays.d_out, wanted), fewest_rows);
  const size_t block_rows = parts(height, largest_tile_rows) * largest_tile_rows;
  size_t tokens = fisher_batch_tokens;
  for (size_t n = 0; n < arrays.sample_count; ++n) {
    tokens = std::max(tokens, static_cast<size_t>(arrays.samples[n].end - arrays.samples[n].begin));
  }
  const size_t scratch_size = tokens * (block_rows + largest_tile_rows + largest_tile_columns);
  std::atomic<bool> complete{true};
  parallel_for(parts(arrays.d_out, block_rows) * across, threads, [&](size_t k) {
    float* scratch = scratch_of_this_thread(scratch_size);
    if (scratch == nullptr) {
      complete = false;
      return;
    }
    const size_t row = k / across * block_rows, column = k % across * block_columns;
    kernels.fisher(
        arrays, {row, std::min(row + block_rows, arrays.d_out), column, std::min(column + block_columns, arrays.d_in)},
        scratch);
  });
  return complete;
}

}  // namespace perta
