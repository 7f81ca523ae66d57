#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "operations.h"
#include "parallel.h"

namespace perta {

namespace {

// A block's packed rows are reused for all its columns, and its packed columns for all its rows.
constexpr size_t most_rows = 192, fewest_rows = 48, block_columns = 768;

size_t parts(size_t whole, size_t part) { return (whole + part - 1) / part; }

}  // namespace

bool accumulate_fisher(const BlockKernels& kernels, const FisherArrays& arrays, int threads) {
  const size_t across = parts(arrays.d_in, block_columns);
  size_t block_rows = most_rows;
  while (block_rows > fewest_rows && parts(arrays.d_out, block_rows) * across < 2 * static_cast<size_t>(threads)) {
    block_rows /= 2;
  }
  size_t tokens = fisher_batch_tokens;
  for (size_t n = 0; n < arrays.sample_count; ++n) {
    tokens = std::max(tokens, static_cast<size_t>(arrays.samples[n].end - arrays.samples[n].begin));
  }
  const size_t scratch_size = tokens * (block_rows + largest_tile_rows + largest_tile_columns);
  std::atomic<bool> complete{true};
  parallel_for(parts(arrays.d_out, block_rows) * across, threads, [&](size_t k) {
    const std::unique_ptr<float[]> scratch(new (std::nothrow) float[scratch_size]);
    if (scratch == nullptr) {
      complete = false;
      return;
    }
    const size_t row = k / across * block_rows, column = k % across * block_columns;
    kernels.fisher(arrays,
                   {row, std::min(row + block_rows, arrays.d_out), column,
                    std::min(column + block_columns, arrays.d_in)},
                   scratch.get());
  });
  return complete;
}

}  // namespace perta
