// Which instruction set's block kernels run on this processor.

#include "instruction_sets.h"

// A set's kernels, from the *_block.cpp that were compiled for it.
#define PERTA_KERNELS(isa)                                                                         \
  namespace isa {                                                                                  \
  RescaledSubtractBlock rescaled_subtract;                                                         \
  AccumulateBlock accumulate;                                                                      \
  FisherBlock fisher;                                                                              \
  HashChunks hash_chunks;                                                                          \
  HashParents hash_parents;                                                                        \
  }                                                                                                \
  static const BlockKernels kernels_##isa = {#isa,        isa::rescaled_subtract, isa::accumulate, \
                                             isa::fisher, isa::hash_chunks,       isa::hash_parents}

namespace perta {

PERTA_KERNELS(portable);
#ifdef PERTA_HAVE_X86
PERTA_KERNELS(avx2);
PERTA_KERNELS(avx512);
#endif

namespace {

bool runs_here(const BlockKernels& kernels) {
#ifdef PERTA_HAVE_X86
  if (&kernels == &kernels_avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  }
  if (&kernels == &kernels_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &kernels == &kernels_portable;
}

const BlockKernels* const widest_first[] = {
#ifdef PERTA_HAVE_X86
    &kernels_avx512,
    &kernels_avx2,
#endif
    &kernels_portable,
};

}  // namespace

const BlockKernels* best_kernels() {
  for (const BlockKernels* kernels : widest_first)
    if (runs_here(*kernels)) return kernels;
  return &kernels_portable;
}

const BlockKernels* kernels_named(const char* name) {
  for (const BlockKernels* kernels : widest_first)
    if (strcmp(kernels->name, name) == 0 && runs_here(*kernels)) return kernels;
  return nullptr;
}

}  // namespace perta
