#!/usr/bin/env bash
# Build, test and measure everything that runs on an NVIDIA GPU, in one call of less than nine minutes:
#
#     bench/gpu.sh [FOLDER]
#
# Uses the python3 on PATH, whose torch must see a GPU and which has what the extra [dev] names, and the CUDA
# compiler on PATH; installs this checkout there, editable. Results go into bench/RESULTS.md and
# bench/results.json and, with the log, into FOLDER. The last lines name what ran out of time or could not run.
# PERTA_BENCH_ELEMENTS and PERTA_BENCH_ROUNDS change the sizes, PERTA_BENCH_SECONDS the time for everything (520).
set -uo pipefail
cd "$(dirname "$0")/.."

seconds=${PERTA_BENCH_SECONDS:-520}
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
exec > >(tee "$folder/gpu.log") 2>&1
summary=()
failed=0

# stage NAME LIMIT COMMAND...: run a command for at most LIMIT seconds, and within the time for everything.
stage() {
    local name=$1 limit=$2 status=0 began=$SECONDS
    shift 2
    echo "== $name"
    if ((limit > seconds - SECONDS)); then limit=$((seconds - SECONDS)); fi
    if ((limit < 5)); then
        summary+=("$name: not measured, no time left")
        failed=1
        return 1
    fi
    timeout --signal=INT --kill-after=10 "$limit" "$@" || status=$?  # pytest still writes results when interrupted
    case $status in
        0) summary+=("$name: done in $((SECONDS - began)) s") ;;
        124 | 137) summary+=("$name: not measured to the end, stopped after $((SECONDS - began)) s") ;;
        *) summary+=("$name: FAILED with exit status $status after $((SECONDS - began)) s") ;;
    esac
    if ((status)); then failed=1; fi
    return "$status"
}

# measure FILE LIMIT [OPTIONS]: run one benchmark and record what it measured.
measure() {
    local result="$folder/$1.json"
    if [ ! -e "bench/$1.py" ]; then
        summary+=("$1: not measured, there is no such benchmark")
        return
    fi
    stage "$1" "$2" python3 -m pytest "bench/$1.py" "${@:3}" -q -c bench/pytest.ini --bench-device cuda \
        --bench-rounds "${PERTA_BENCH_ROUNDS:-10}" --bench-elements "${PERTA_BENCH_ELEMENTS:-256000000}" \
        --benchmark-json="$result"
    if [ -s "$result" ]; then python3 -m bench.record "$result"; fi
}

stage 'conditions' 60 python3 -c '
import torch
assert torch.cuda.is_available(), "bench/gpu.sh needs a GPU that torch can use"
import blake3, hypothesis, ninja, pybind11, pytest, pytest_benchmark, safetensors, transformers, triton
print("torch", torch.__version__, "cuda", torch.version.cuda, "triton", triton.__version__)
print(torch.cuda.get_device_name(), "compute capability %d.%d" % torch.cuda.get_device_capability())' || exit 1
nvcc --version | tail -n 1

# Compile for this device only, which is quicker.
PERTA_CUDA_ARCHS=$(python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
export PERTA_CUDA=1 PERTA_CUDA_ARCHS
stage 'build' 180 python3 -m pip install --quiet --no-deps --no-build-isolation --editable . || exit 1

stage 'tests' 170 python3 -m pytest tests/ops tests/importance tests/evaluation tests/sweeping/test_sweep.py \
    tests/subtraction/test_on_module.py tests/subtraction/test_on_module_copies.py -q -k 'cuda or triton or live'
if command -v compute-sanitizer >/dev/null; then
    # Without torch's cache of device memory, so that an access beyond the end of a tensor is found.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage 'compute-sanitizer' 100 \
        compute-sanitizer --tool memcheck --error-exitcode 99 \
        python3 -m pytest -q tests/ops/test_rescaled_subtract.py::test_cuda_many \
        tests/ops/test_accumulate.py::test_cuda tests/ops/test_low_rank_subtract.py::test_cuda \
        tests/ops/test_triton_fisher.py::test_types
else
    summary+=('compute-sanitizer: not measured, it is not on PATH')
fi

measure bench_subtract 110
measure bench_accumulate 60
measure bench_fisher 170
measure bench_stream 150 -k large_layers
measure bench_eval 90

cp bench/RESULTS.md bench/results.json "$folder"/ 2>/dev/null
echo '== summary'
printf '%s\n' "${summary[@]}"
echo "results: $folder"
exit "$failed"
