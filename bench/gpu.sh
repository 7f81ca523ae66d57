#!/usr/bin/env bash
# Build, test and measure what runs on an NVIDIA GPU:
#
#     bench/gpu.sh [FOLDER [STAGE...]]
#
# Stages, what is worth most first: tests, subtract, accumulate, fisher, stream, eval, sanitizer; all, if none is named.
# They take more than ten minutes together. Where a call must end within ten, these three have time for all:
#
#     bench/gpu.sh FOLDER tests subtract accumulate
#     bench/gpu.sh FOLDER fisher stream
#     bench/gpu.sh FOLDER eval sanitizer
#
# Uses the python3 on PATH, whose torch must see a GPU; the first stage, conditions, says which packages are missing.
# Compiles with the CUDA compiler on PATH, and installs this checkout, editable. FOLDER gets the log, a JSON file for
# each benchmark, and bench/RESULTS.md and bench/results.json with what was measured; elsewhere,
# `python -m bench.record FOLDER/bench_*.json` adds the same. The last lines name what ran out of time, failed or could
# not run.
# PERTA_BENCH_SECONDS bounds everything (570); PERTA_BENCH_ELEMENTS and PERTA_BENCH_ROUNDS change the sizes.
set -uo pipefail
cd "$(dirname "$0")/.."

worth=(tests subtract accumulate fisher stream eval sanitizer)
declare -A limits=( # seconds
    [conditions]=45 [build]=160 [build without CUDA]=60 [record]=30
    [tests]=170 [subtract]=110 [accumulate]=55 [fisher]=160 [stream]=175 [eval]=110 [sanitizer]=220
)
seconds=${PERTA_BENCH_SECONDS:-570}
folder=${1:-$(mktemp -d)}
stages=("${@:2}")
if ((${#stages[@]} == 0)); then stages=("${worth[@]}"); fi
for name in "${stages[@]}"; do
    if [[ " ${worth[*]} " != *" $name "* ]]; then
        echo "bench/gpu.sh: no stage $name; there are ${worth[*]}" >&2
        exit 2
    fi
done
mkdir -p "$folder"
exec > >(tee "$folder/gpu.log") 2>&1
log=$!
summary=()
results=()
failed=0

# stage NAME COMMAND...: run a command within the limit of that name, and within the time for everything. It is told
# to end ten seconds early; at the limit it is interrupted, also where interrupts are ignored, as in the background.
stage() {
    local name=$1 limit=${limits[$1]} left=$((seconds - SECONDS)) status=0 began=$SECONDS
    shift
    echo "== $name"
    if [ "$name" != record ]; then left=$((left - limits[record])); fi
    if ((limit > left)); then limit=$left; fi
    if ((limit < 15)); then
        summary+=("$name: not run, no time left")
        failed=1
        return 1
    fi
    PERTA_BENCH_DEADLINE=$(($(date +%s) + limit - 10)) timeout --signal=INT --kill-after=10 "$limit" \
        env --default-signal=INT "$@" || status=$?
    case $status in
        0) summary+=("$name: done in $((SECONDS - began)) s") ;;
        124 | 137) summary+=("$name: not done, stopped after $((SECONDS - began)) s") ;;
        *) summary+=("$name: FAILED with exit status $status after $((SECONDS - began)) s") ;;
    esac
    if ((status)); then failed=1; fi
    return "$status"
}

# measure NAME ROUNDS [OPTIONS]: run one benchmark.
measure() {
    local result="$folder/bench_$1.json"
    stage "$1" python3 -m pytest "bench/bench_$1.py" "${@:3}" -v -c bench/pytest.ini --bench-device cuda \
        --bench-rounds "${PERTA_BENCH_ROUNDS:-$2}" --bench-elements "${PERTA_BENCH_ELEMENTS:-256000000}" \
        --benchmark-json="$result"
    if [ -s "$result" ]; then results+=("$result"); fi
}

# Without torch's cache of device memory, so that an access beyond the end of a tensor is found.
sanitize() {
    if ! command -v compute-sanitizer >/dev/null; then
        summary+=('sanitizer: not run, compute-sanitizer is not on PATH')
        return
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage sanitizer compute-sanitizer --tool memcheck --error-exitcode 99 \
        python3 -m pytest -vv tests/ops/test_rescaled_subtract.py::test_cuda_many \
        tests/ops/test_accumulate.py::test_cuda tests/ops/test_low_rank_subtract.py::test_cuda \
        tests/ops/test_triton_fisher.py::test_types
}

install() {
    stage "$1" python3 -m pip install --quiet --no-deps --no-build-isolation --editable .
}

finish() {
    if ((${#results[@]})); then
        stage record python3 -m bench.record "${results[@]}"
        cp bench/RESULTS.md bench/results.json "$folder"/
    fi
    echo '== summary'
    printf '%s\n' "${summary[@]}"
    echo "results: $folder"
    exec >&- 2>&-
    wait "$log" # it may still hold the last lines
    exit "$failed"
}

stage conditions python3 -m bench.harness.gpu_ready || finish
# Compile for this device only, which is quicker.
PERTA_CUDA_ARCHS=$(python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
export PERTA_CUDA=1 PERTA_CUDA_ARCHS
if ! install build; then
    summary+=('all that follows is without CUDA kernels, as they could not be built')
    export PERTA_CUDA=0
    install 'build without CUDA' || finish
fi

for name in "${stages[@]}"; do
    case $name in
        tests) stage tests python3 -m bench.harness.gpu_tests ;;
        subtract | accumulate | fisher) measure "$name" 5 ;;
        stream) measure stream 2 -k large_layers ;;
        eval) measure eval 3 ;;
        sanitizer) sanitize ;;
    esac
done
finish
