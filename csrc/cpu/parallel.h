// A loop over threads: those of torch's OpenMP runtime, or a small pool that lives as long as the process.
#pragma once

#include <cstddef>
#include <functional>

namespace perta {

// Calls work(k) once for every k in [0, count) on up to `threads` threads, the caller among them; returns when
// all are done. Which thread takes which k is not fixed. A call from within `work` runs on the calling thread.
void parallel_for(size_t count, int threads, const std::function<void(size_t)>& work);

// Processors that this process may run on.
int available_threads();

}  // namespace perta
