// work(0), ..., work(count - 1), each once, over threads that take the next number when they are free.
//
// Assumes work of about 10 microseconds or more a call, beside which handing it out costs little. Moves no data.

#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include <dlfcn.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#endif

namespace perta {
namespace {

// One job at a time: a second caller that finds the pool busy works alone, which is always correct.
class Pool {
 public:
  void run(size_t count, int threads, const std::function<void(size_t)>& work) {
    grow(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      seats_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    drain(work, count);
    std::unique_lock<std::mutex> lock(mutex_);
    seats_ = 0;  // workers that have not woken yet need not join any more
    done_.wait(lock, [this] { return active_ == 0; });
    work_ = nullptr;
  }

  std::mutex busy;

 private:
  void drain(const std::function<void(size_t)>& work, size_t count) {
    for (size_t k = next_.fetch_add(1); k < count; k = next_.fetch_add(1)) work(k);
  }

  void grow(int workers) {
    while (static_cast<int>(threads_.size()) < workers) {
      threads_.emplace_back([this] { serve(); });
      threads_.back().detach();
    }
  }

  void serve() {
    unsigned seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen && seats_ > 0; });
      seen = generation_;
      --seats_;
      ++active_;
      const std::function<void(size_t)>* work = work_;
      const size_t count = count_;
      lock.unlock();
      drain(*work, count);
      lock.lock();
      if (--active_ == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  const std::function<void(size_t)>* work_ = nullptr;
  size_t count_ = 0;
  std::atomic<size_t> next_{0};
  int seats_ = 0;
  int active_ = 0;
  unsigned generation_ = 0;
};

// Never destroyed, as its threads outlive main. A forked child has none of them and so makes a pool of its own.
Pool& pool() {
  static std::mutex making;
  static Pool* current = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(making);
  if (current == nullptr || owner != getpid()) {
    current = new Pool;
    owner = getpid();
  }
  return *current;
}

thread_local bool inside = false;

// GOMP_parallel(body, data, threads, flags) of the OpenMP runtime that torch works with, once torch is loaded.
// Its threads spin for a while after every operation of torch, and would keep the processors from a pool of our own.
using OpenMPParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

const pid_t loaded_in = getpid();

OpenMPParallel openmp_parallel() {
  static std::atomic<OpenMPParallel> found{nullptr};
  if (found == nullptr) found = reinterpret_cast<OpenMPParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return getpid() == loaded_in ? found.load() : nullptr;  // a forked child has none of the runtime's threads
}

struct Shared {
  const std::function<void(size_t)>& work;
  const size_t count;
  std::atomic<size_t> next{0};
};

void drain(void* shared) {
  Shared& tasks = *static_cast<Shared*>(shared);
  inside = true;
  for (size_t k = tasks.next.fetch_add(1); k < tasks.count; k = tasks.next.fetch_add(1)) tasks.work(k);
  inside = false;
}

}  // namespace

void parallel_for(size_t count, int threads, const std::function<void(size_t)>& work) {
  if (count > 1 && threads > 1 && !inside) {
    if (const OpenMPParallel parallel = openmp_parallel()) {
      // As many threads as torch uses, even for fewer tasks: with another number the runtime would start new threads.
      Shared shared{work, count};
      parallel(drain, &shared, static_cast<unsigned>(threads), 0);
      return;
    }
    Pool& shared = pool();
    std::unique_lock<std::mutex> lock(shared.busy, std::try_to_lock);
    if (lock.owns_lock()) {
      inside = true;
      shared.run(count, threads < static_cast<int>(count) ? threads : static_cast<int>(count), work);
      inside = false;
      return;
    }
  }
  for (size_t k = 0; k < count; ++k) work(k);
}

int available_threads() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? static_cast<int>(count) : 1;
}

}  // namespace perta
