// F += sum over samples of (delta_n^T a_n)^2, with each sample's product held in registers only.
//
// Both factors have the token as their slow index, so a product of a few rows by a few vectors of columns is a sum of
// outer products: load the columns once a token, broadcast the rows, multiply and add. After the last token of a
// sample, the registers hold its gradient, which is squared into F at once. Packing copies the rows and columns of a
// block side by side, as float32, with zeros beyond the edge of the matrix.
//
// Assumes float32 accumulators aligned to their elements; inputs may lie at any byte.
// FLOPs: 2 a token and element of F, as in an ordinary backward, and 2 a sample and element for the square.
// Bytes: 8 an element of F and batch of tokens; each input once a block that it is packed for.
//
// Compiled once per instruction set, with `static` code only; see rescaled_subtract_block.cpp. Unlike there, products
// and sums may be fused.

#include "instruction_sets.h"
#include "storage.h"

namespace perta::PERTA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr size_t width = 16, tile_rows = 8, tile_vectors = 3;
#elif defined(__AVX2__)
constexpr size_t width = 8, tile_rows = 4, tile_vectors = 3;
#elif defined(__aarch64__)
constexpr size_t width = 4, tile_rows = 8, tile_vectors = 3;
#else
constexpr size_t width = 4, tile_rows = 4, tile_vectors = 3;
#endif
constexpr size_t tile_columns = width * tile_vectors;
static_assert(tile_rows <= largest_tile_rows && tile_columns <= largest_tile_columns, "the scratch is sized by these");

size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

using Vector = float __attribute__((vector_size(width * sizeof(float)), aligned(4), may_alias));

// Copies columns [column, column + count) of the rows of some samples, one token after another, each padded with
// zeros to `padded` values.
template <float read(const void*, size_t), size_t padded>
void pack(const void* matrix, size_t stride, size_t column, size_t count, const SampleRows* samples,
          size_t sample_count, float* packed) {
  for (size_t n = 0; n < sample_count; ++n) {
    for (int64_t row = samples[n].begin; row < samples[n].end; ++row, packed += padded) {
      const size_t first = static_cast<size_t>(row) * stride + column;
      if (count == padded) {  // a count that the compiler knows
        for (size_t k = 0; k < padded; ++k) packed[k] = read(matrix, first + k);
      } else {
        for (size_t k = 0; k < padded; ++k) packed[k] = k < count ? read(matrix, first + k) : 0.0f;
      }
    }
  }
}

template <size_t padded>
void pack(const void* matrix, DType dtype, size_t stride, size_t column, size_t count, const SampleRows* samples,
          size_t sample_count, float* packed) {
  if (dtype == DType::f32) {
    pack<read_f32, padded>(matrix, stride, column, count, samples, sample_count, packed);
  } else if (dtype == DType::bf16) {
    pack<read_bf16, padded>(matrix, stride, column, count, samples, sample_count, packed);
  } else {
    pack<read_f16, padded>(matrix, stride, column, count, samples, sample_count, packed);
  }
}

// One tile of F, from the packed rows and columns of a few samples.
template <bool with_gradient>
void accumulate_tile(const float* rows, const float* columns, const SampleRows* samples, size_t sample_count,
                     float* fisher, float* gradient, size_t stride) {
  for (size_t n = 0; n < sample_count; ++n) {
    Vector sums[tile_rows][tile_vectors] = {};
    const int64_t tokens = samples[n].end - samples[n].begin;
    for (int64_t t = 0; t < tokens; ++t, rows += tile_rows, columns += tile_columns) {
      Vector column[tile_vectors];
#pragma GCC unroll 8
      for (size_t v = 0; v < tile_vectors; ++v) column[v] = *reinterpret_cast<const Vector*>(columns + v * width);
#pragma GCC unroll 8
      for (size_t m = 0; m < tile_rows; ++m) {
#pragma GCC unroll 8
        for (size_t v = 0; v < tile_vectors; ++v) sums[m][v] += rows[m] * column[v];
      }
    }
#pragma GCC unroll 8
    for (size_t m = 0; m < tile_rows; ++m) {
#pragma GCC unroll 8
      for (size_t v = 0; v < tile_vectors; ++v) {
        Vector& total = *reinterpret_cast<Vector*>(fisher + m * stride + v * width);
        total += sums[m][v] * sums[m][v];
        if (with_gradient) *reinterpret_cast<Vector*>(gradient + m * stride + v * width) += sums[m][v];
      }
    }
  }
}

// A tile that reaches beyond the edge of the matrix works on a copy.
template <bool with_gradient>
void accumulate_edge(const float* rows, const float* columns, const SampleRows* samples, size_t sample_count,
                     float* fisher, float* gradient, size_t stride, size_t height, size_t breadth) {
  float fisher_copy[tile_rows * tile_columns] = {};
  float gradient_copy[tile_rows * tile_columns] = {};
  const auto copy = [&](float* matrix, float* tile, bool back) {
    for (size_t m = 0; m < height; ++m) {
      for (size_t k = 0; k < breadth; ++k) {
        float& outside = matrix[m * stride + k];
        float& inside = tile[m * tile_columns + k];
        (back ? outside : inside) = back ? inside : outside;
      }
    }
  };
  copy(fisher, fisher_copy, false);
  if (with_gradient) copy(gradient, gradient_copy, false);
  accumulate_tile<with_gradient>(rows, columns, samples, sample_count, fisher_copy, gradient_copy, tile_columns);
  copy(fisher, fisher_copy, true);
  if (with_gradient) copy(gradient, gradient_copy, true);
}

template <bool with_gradient>
void accumulate_batch(const FisherArrays& arrays, FisherRegion region, const SampleRows* samples, size_t sample_count,
                      size_t tokens, float* scratch) {
  float* columns = scratch;
  float* rows = scratch + tile_columns * tokens;
  for (size_t row = region.row; row < region.row_end; row += tile_rows) {
    pack<tile_rows>(arrays.output_gradients, arrays.output_gradients_dtype, arrays.d_out, row,
                    smaller(tile_rows, region.row_end - row), samples, sample_count,
                    rows + (row - region.row) * tokens);
  }
  for (size_t column = region.column; column < region.column_end; column += tile_columns) {
    const size_t breadth = smaller(tile_columns, region.column_end - column);
    pack<tile_columns>(arrays.activations, arrays.activations_dtype, arrays.d_in, column, breadth, samples,
                       sample_count, columns);
    for (size_t row = region.row; row < region.row_end; row += tile_rows) {
      const size_t height = smaller(tile_rows, region.row_end - row);
      const float* packed = rows + (row - region.row) * tokens;
      float* fisher = arrays.fisher + row * arrays.d_in + column;
      float* gradient = with_gradient ? arrays.gradient + row * arrays.d_in + column : nullptr;
      if (height == tile_rows && breadth == tile_columns) {
        accumulate_tile<with_gradient>(packed, columns, samples, sample_count, fisher, gradient, arrays.d_in);
      } else {
        accumulate_edge<with_gradient>(packed, columns, samples, sample_count, fisher, gradient, arrays.d_in, height,
                                       breadth);
      }
    }
  }
}

}  // namespace

FisherBlock fisher;

void fisher(const FisherArrays& arrays, FisherRegion region, float* scratch) {
  for (size_t n = 0; n < arrays.sample_count;) {
    const size_t first = n;
    size_t tokens = 0;
    while (n < arrays.sample_count) {
      const size_t more = static_cast<size_t>(arrays.samples[n].end - arrays.samples[n].begin);
      if (tokens > 0 && tokens + more > fisher_batch_tokens) break;
      tokens += more;
      ++n;
    }
    if (tokens == 0) continue;
    const auto accumulate = arrays.gradient == nullptr ? accumulate_batch<false> : accumulate_batch<true>;
    accumulate(arrays, region, arrays.samples + first, n - first, tokens, scratch);
  }
}

}  // namespace perta::PERTA_ISA
