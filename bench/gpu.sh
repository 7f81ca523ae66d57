#!/usr/bin/env bash
# Build, test and measure everything that runs on an NVIDIA GPU, in one call:
#
#     bench/gpu.sh [FOLDER]
#
# Uses the python3 on PATH, whose torch must see a GPU, and the CUDA compiler on PATH. Results go
# into bench/RESULTS.md and bench/results.json and, with the log of the run, into FOLDER if given.
# PERTA_BENCH_ELEMENTS and PERTA_BENCH_ROUNDS change the sizes.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -n "$folder" ]; then
    mkdir -p "$folder"
    exec > >(tee "$folder/gpu.log") 2>&1
fi

echo '== conditions'
python3 -c '
import sys, torch
if not torch.cuda.is_available():
    sys.exit("bench/gpu.sh needs a GPU that torch can use: torch.cuda.is_available() is False")
print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())'
nvcc --version | tail -n 1

echo '== build'
PERTA_CUDA=1 python3 setup.py build_ext --inplace

echo '== test'
tested=0
python3 -m pytest tests -q -k 'cuda or triton' || tested=$?

echo '== measure'
measured=0
python3 -m pytest bench/bench_subtract.py bench/bench_fold.py -q --bench-device cuda \
    --bench-rounds "${PERTA_BENCH_ROUNDS:-20}" --bench-elements "${PERTA_BENCH_ELEMENTS:-256000000}" \
    --benchmark-json="$scratch/run.json" || measured=$?

if [ -s "$scratch/run.json" ]; then
    python3 -m bench.record "$scratch/run.json"
    if [ -n "$folder" ]; then
        cp bench/RESULTS.md bench/results.json "$scratch/run.json" "$folder"/
    fi
fi
echo "== tests: exit status $tested; measurements: exit status $measured"
exit $((tested || measured))
