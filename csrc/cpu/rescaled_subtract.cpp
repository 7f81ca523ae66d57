// out = round(theta - (lam w) (theta_f - theta_0)) over threads. Formula, bytes and FLOPs: rescaled_subtract_block.cpp.

#include "operations.h"

#include <vector>

#include "parallel.h"

namespace perta {

namespace {
constexpr size_t grain = 64 * 1024;  // elements a task: large beside the cost of handing it out
}

void rescaled_subtract(const BlockKernels& kernels, const RescaleArrays& arrays, const Rescaling& rescaling, size_t n,
                       int threads, RescaleStatistics* statistics) {
  const size_t tasks = (n + grain - 1) / grain;
  std::vector<RescaleStatistics> parts(statistics == nullptr ? 0 : tasks);
  parallel_for(tasks, threads, [&](size_t k) {
    const size_t end = (k + 1) * grain < n ? (k + 1) * grain : n;
    kernels.rescaled_subtract(arrays, rescaling, k * grain, end, statistics == nullptr ? nullptr : &parts[k]);
  });
  if (statistics == nullptr) return;
  // Summed in order, so that the figures do not depend on the number of threads.
  RescaleStatistics& total = *statistics;
  total = {};
  for (const RescaleStatistics& part : parts) {
    total.sum_weight += part.sum_weight;
    total.sum_squared_theta += part.sum_squared_theta;
    total.sum_squared_change += part.sum_squared_change;
    total.changed += part.changed;
    total.nonzero_task |= part.nonzero_task;
    total.nonfinite_out += part.nonfinite_out;
    total.nonfinite_forget += part.nonfinite_forget;
    total.nonfinite_retain += part.nonfinite_retain;
    total.invalid_ratio += part.invalid_ratio;
  }
}

}  // namespace perta
