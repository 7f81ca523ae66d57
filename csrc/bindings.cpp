// The Python module perta_fast._C: the operations rescaled_subtract (with its factors: low_rank_subtract), accumulate
// and fisher on the CPU and, built with CUDA, as cuda_*; hashes and reads of files; the choice of an instruction set;
// and what was built.
//
// Takes addresses, counts and codes. Assumes that they are right: its callers, perta_fast.ops, perta_fast.files and
// perta_fast.subtraction, check types, shapes and overlap first, and keep the memory alive during the call.
// Moves no data of its own. The GIL is released while a kernel, a hash or a read is at work.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/file_hash.h"
#include "cpu/file_reads.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#ifdef PERTA_WITH_CUDA
#include "cuda/operations.h"
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

const perta::BlockKernels* kernels = perta::best_kernels();

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

perta::DType dtype(int code) {
  if (code < 0 || code > 2) throw py::value_error("dtype code must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  return static_cast<perta::DType>(code);
}

perta::RescaleArrays arrays(Address out, Address theta, Address tuned, Address base, Address forget, Address retain,
                            const py::tuple& dtypes) {
  if (dtypes.size() != 5) throw py::value_error("five dtype codes are needed");
  const auto code = [&](size_t i) { return dtype(dtypes[i].cast<int>()); };
  return {pointer(out), pointer(theta), pointer(tuned), pointer(base), pointer(forget), pointer(retain),
          code(0),      code(1),        code(2),        code(3),       code(4)};
}

// A perta_fast.rules.Rescaling.
perta::Rescaling rescaling(const py::object& settings) {
  const auto number = [&](const char* name) { return settings.attr(name).cast<float>(); };
  const bool masked = !settings.attr("threshold").is_none();
  return {number("lam"), number("p"), number("alpha"), masked ? number("threshold") : 0.0f, masked};
}

// A task vector by its factors: left, right, rank, columns, scale, first element; see LowRank.
using Factors = std::tuple<Address, Address, size_t, size_t, float, size_t>;

perta::LowRank low_rank(const Factors& factors) {
  const auto& [left, right, rank, columns, scale, first] = factors;
  return {
      static_cast<const float*>(pointer(left)), static_cast<const float*>(pointer(right)), rank, columns, scale, first};
}

// (descriptor, target, begin, count, begin and count of what is wanted soon, whether to drop the pages, hash or None).
using ReadEntry = std::tuple<int, Address, uint64_t, uint64_t, uint64_t, uint64_t, bool, perta::FileHash*>;

std::vector<perta::FileRead> file_reads(const std::vector<ReadEntry>& entries) {
  std::vector<perta::FileRead> reads;
  for (const auto& [descriptor, target, begin, count, soon_begin, soon_count, drop_cache, hash] : entries) {
    reads.push_back({descriptor, static_cast<unsigned char*>(pointer(target)), begin, count, soon_begin, soon_count,
                     drop_cache, hash});
  }
  return reads;
}

// Raises ReadFailed with the number of a read and its errno, 0 if the file ends too early.
void check(const std::optional<perta::FailedRead>& failed) {
  if (!failed.has_value()) return;
  const py::object type = py::module_::import("perta_fast._C").attr("ReadFailed");
  PyErr_SetObject(type.ptr(), py::make_tuple(failed->number, failed->error).ptr());
  throw py::error_already_set();
}

void read_files(const std::vector<ReadEntry>& entries) {
  const std::vector<perta::FileRead> reads = file_reads(entries);
  std::optional<perta::FailedRead> failed;
  {
    py::gil_scoped_release released;
    failed = perta::read_files(*kernels, reads);
  }
  check(failed);
}

// Without forget, retain is the ratio. Returns the statistics if `counted`, else None. factors: the task vector,
// instead of tuned and base. entries: reads that fill arrays first: in one call with them, the GIL is given back and
// asked for once, and not once for each array.
py::object rescaled_subtract(Address out, Address theta, Address tuned, Address base, Address forget, Address retain,
                             const py::tuple& dtypes, size_t n, const py::object& settings, int threads, bool counted,
                             const std::optional<Factors>& factors, const std::vector<ReadEntry>& entries) {
  perta::RescaleArrays all = arrays(out, theta, tuned, base, forget, retain, dtypes);
  perta::LowRank task;
  if (factors.has_value()) {
    task = low_rank(*factors);
    all.low_rank = &task;
  }
  const perta::Rescaling how = rescaling(settings);
  const std::vector<perta::FileRead> reads = file_reads(entries);
  std::optional<perta::FailedRead> failed;
  perta::RescaleStatistics statistics;
  {
    py::gil_scoped_release released;
    failed = perta::read_files(*kernels, reads);
    if (!failed.has_value()) {
      perta::rescaled_subtract(*kernels, all, how, n, threads, counted ? &statistics : nullptr);
    }
  }
  check(failed);
  if (!counted) return py::none();
  py::dict result;
  result["sum_weight"] = statistics.sum_weight;
  result["sum_squared_theta"] = statistics.sum_squared_theta;
  result["sum_squared_change"] = statistics.sum_squared_change;
  result["changed"] = statistics.changed;
  result["nonzero_task"] = statistics.nonzero_task;
  result["nonfinite_out"] = statistics.nonfinite_out;
  result["nonfinite_forget"] = statistics.nonfinite_forget;
  result["nonfinite_retain"] = statistics.nonfinite_retain;
  result["invalid_ratio"] = statistics.invalid_ratio;
  return result;
}

void accumulate(Address accumulator, Address gradient, int dtype_code, bool squared, size_t n, int threads) {
  const perta::DType type = dtype(dtype_code);
  py::gil_scoped_release released;
  perta::accumulate(*kernels, static_cast<float*>(pointer(accumulator)), pointer(gradient), type, squared, n, threads);
}

void fisher(Address squares, Address gradient, Address activations, Address output_gradients, int activations_dtype,
            int output_gradients_dtype, size_t d_in, size_t d_out, Address samples, size_t sample_count, int threads) {
  const perta::FisherArrays arrays{static_cast<float*>(pointer(squares)),
                                   static_cast<float*>(pointer(gradient)),
                                   pointer(activations),
                                   pointer(output_gradients),
                                   dtype(activations_dtype),
                                   dtype(output_gradients_dtype),
                                   d_in,
                                   d_out,
                                   static_cast<const perta::SampleRows*>(pointer(samples)),
                                   sample_count};
  bool complete;
  {
    py::gil_scoped_release released;
    complete = perta::fisher(*kernels, arrays, threads);
  }
  if (!complete) throw std::bad_alloc();
}

void add_to_hash(perta::FileHash& hash, Address bytes, uint64_t begin, uint64_t count) {
  py::gil_scoped_release released;
  hash.add(*kernels, static_cast<const unsigned char*>(pointer(bytes)), begin, count);
}

py::bytes digest(perta::FileHash& hash) {
  perta::FileHash::Value value;
  if (!hash.digest(&value)) throw py::value_error("bytes of the file are missing");
  return py::bytes(reinterpret_cast<const char*>(value.data()), value.size());
}

void select_instruction_set(const std::string& name) {
  const perta::BlockKernels* chosen = name == "best" ? perta::best_kernels() : perta::kernels_named(name.c_str());
  if (chosen == nullptr) throw py::value_error("this processor or build has no instruction set '" + name + "'");
  kernels = chosen;
}

#ifdef PERTA_WITH_CUDA
void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
}

// Entries are (out, theta, tuned, base, forget importance, retain importance, dtypes, elements), one a tensor.
using RescaleEntry = std::tuple<Address, Address, Address, Address, Address, Address, py::tuple, size_t>;

void cuda_rescaled_subtract(const std::vector<RescaleEntry>& entries, const py::object& settings, Address stream) {
  std::vector<perta::cuda::RescaleTensor> tensors;
  for (const auto& [out, theta, tuned, base, forget, retain, dtypes, n] : entries) {
    tensors.push_back({arrays(out, theta, tuned, base, forget, retain, dtypes), n});
  }
  const perta::Rescaling how = rescaling(settings);
  py::gil_scoped_release released;
  check(perta::cuda::rescaled_subtract(tensors, how, pointer(stream)));
}

void cuda_low_rank_subtract(Address out, Address theta, Address forget, Address retain, const py::tuple& dtypes,
                            size_t n, const py::object& settings, const Factors& factors, Address stream) {
  perta::RescaleArrays all = arrays(out, theta, 0, 0, forget, retain, dtypes);
  const perta::LowRank task = low_rank(factors);
  all.low_rank = &task;
  const perta::Rescaling how = rescaling(settings);
  py::gil_scoped_release released;
  check(perta::cuda::low_rank_subtract({all, n}, how, pointer(stream)));
}

// Entries are (accumulator, gradient, the gradient's dtype, elements).
void cuda_accumulate(const std::vector<std::tuple<Address, Address, int, size_t>>& entries, bool squared,
                     Address stream) {
  std::vector<perta::cuda::AccumulateTensor> tensors;
  for (const auto& [accumulator, gradient, dtype_code, n] : entries) {
    tensors.push_back({static_cast<float*>(pointer(accumulator)), pointer(gradient), dtype(dtype_code), n});
  }
  py::gil_scoped_release released;
  check(perta::cuda::accumulate(tensors, squared, pointer(stream)));
}
#endif

py::dict build_info() {
  py::dict info;
  info["instruction_set"] = kernels->name;
  py::list sets;
  for (const char* name : {"portable", "avx2", "avx512"})
    if (perta::kernels_named(name) != nullptr) sets.append(name);
  info["instruction_sets"] = sets;
#ifdef PERTA_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["threads"] = perta::available_threads();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of perta_fast; called through perta_fast.ops.";
  m.def("rescaled_subtract", &rescaled_subtract, py::arg("out"), py::arg("theta"), py::arg("tuned"), py::arg("base"),
        py::arg("forget_importance"), py::arg("retain_importance"), py::arg("dtypes"), py::arg("n"),
        py::arg("rescaling"), py::arg("threads"), py::arg("counted"), py::arg("factors") = py::none(),
        py::arg("reads") = py::tuple());
  m.def("accumulate", &accumulate, py::arg("accumulator"), py::arg("gradient"), py::arg("dtype"), py::arg("squared"),
        py::arg("n"), py::arg("threads"));
  m.def("fisher", &fisher, py::arg("fisher"), py::arg("gradient"), py::arg("activations"), py::arg("output_gradients"),
        py::arg("activations_dtype"), py::arg("output_gradients_dtype"), py::arg("d_in"), py::arg("d_out"),
        py::arg("samples"), py::arg("sample_count"), py::arg("threads"));
  py::class_<perta::FileHash>(m, "FileHash")
      .def(py::init<uint64_t>(), py::arg("size"))
      .def("add", &add_to_hash, py::arg("bytes"), py::arg("begin"), py::arg("count"))
      .def("missing", &perta::FileHash::missing)
      .def("digest", &digest);
  m.def("read_files", &read_files, py::arg("reads"));
  m.attr("ReadFailed") =
      py::reinterpret_steal<py::object>(PyErr_NewException("perta_fast._C.ReadFailed", PyExc_Exception, nullptr));
  m.def("select_instruction_set", &select_instruction_set, py::arg("name"));
  m.def("build_info", &build_info);
  m.def("available_threads", &perta::available_threads);
#ifdef PERTA_WITH_CUDA
  m.def("cuda_rescaled_subtract", &cuda_rescaled_subtract, py::arg("entries"), py::arg("rescaling"), py::arg("stream"));
  m.def("cuda_low_rank_subtract", &cuda_low_rank_subtract, py::arg("out"), py::arg("theta"),
        py::arg("forget_importance"), py::arg("retain_importance"), py::arg("dtypes"), py::arg("n"),
        py::arg("rescaling"), py::arg("factors"), py::arg("stream"));
  m.def("cuda_accumulate", &cuda_accumulate, py::arg("entries"), py::arg("squared"), py::arg("stream"));
#endif
}
