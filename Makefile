# Each of `make demo` and `make test` is all that a fresh machine with python3 and a C++ compiler needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f)

# The tests of `make quick`, which with lint takes less than a minute on two processors (the first time more, as mypy
# fills its cache): formats, data, records and operations, files in which no child process and next to no model runs.
# What takes more than about two seconds in them is marked slow and left out; each run shows its three slowest tests.
QUICK := $(addprefix tests/,test_rules.py checkpoints/test_checkpoint.py checkpoints/test_quantised.py \
  checkpoints/test_safetensors_file.py cli/test_bad_input.py data files/test_journal.py files/test_new_file.py \
  importance/test_store.py ops/test_accumulate.py ops/test_bad_arguments.py ops/test_fisher.py \
  ops/test_rescaled_subtract.py records subtraction/test_matching.py)

# The tests of `make lowest`.
LOWEST := $(addprefix tests/,checkpoints/test_adapters.py data/test_formats.py \
  evaluation/test_metrics.py evaluation/test_rouge.py families/test_families.py files/test_hashing.py \
  importance/test_per_sample.py importance/test_store.py reporting/test_figures.py runs/test_adapters_end_to_end.py \
  streaming/test_streaming.py)

.PHONY: demo quick test bench lint format docs cuda-check wheel-check lowest clean

# make demo DEMO=--fast takes seconds.
demo: $(VENV)/built
	OMP_WAIT_POLICY=passive $(BIN)/perta demo $(DEMO)

# Two files at a time, each with one thread for torch: its models are too small for more.
test: $(VENV)/built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -p no:benchmark

quick: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(QUICK) -m 'not slow' -n 2 --dist loadfile -p no:benchmark --durations=3

bench: $(VENV)/built
	$(BIN)/python -m pytest bench -c bench/pytest.ini --benchmark-only --benchmark-group-by=group

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(wildcard tests/csrc/*.h tests/csrc/*.cpp)
	$(BIN)/hadolint Dockerfile

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(wildcard tests/csrc/*.h tests/csrc/*.cpp)

# The pages of docs/ and the Python API from its docstrings, into build/site; a broken link is an error.
docs: $(VENV)/built
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Compiles every CUDA source without linking or running it.
cuda-check:
	@command -v nvcc >/dev/null || { echo "cuda-check: skipped, nvcc is not on PATH"; exit 0; }; \
	for source in csrc/cuda/*.cu; do \
	  echo "nvcc $$source"; \
	  nvcc -std=c++17 --fmad=false -Werror all-warnings -Icsrc -Icsrc/cuda -arch=sm_90 -c $$source -o /dev/null || exit 1; \
	done

# The source distribution, the wheel built from that alone, and the wheel in an environment of its own with the lowest
# versions that it allows, of all but torch, run from elsewhere on a PATH without a compiler. It works on a copy of the
# tree, so that it can run beside the tests. No CUDA: cuda-check compiles that.
wheel-check: $(VENV)/built
	rm -rf build/wheel-check && mkdir -p build/wheel-check/source
	git ls-files -z | xargs -0 cp --parents --target-directory build/wheel-check/source
	cd build/wheel-check/source && $(CURDIR)/$(BIN)/python -c "from setuptools.build_meta import build_sdist; build_sdist('..')" >/dev/null
	PERTA_CUDA=0 $(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel-check build/wheel-check/*.tar.gz
	$(PYTHON) -m venv --without-pip build/wheel-check/environment
	$(BIN)/pip --python build/wheel-check/environment install --quiet --no-compile torch==2.13.0
	$(BIN)/pip --python build/wheel-check/environment install --quiet --no-compile build/wheel-check/*.whl \
	  --constraint tests/lowest.txt
	cd build/wheel-check && env -i PATH="$$PWD/environment/bin" perta --version
	cd build/wheel-check && env -i PATH="$$PWD/environment/bin" python -c "from perta_fast import compiled; compiled.kernels()"

# Tests of that wheel with those lowest versions: a few files of the rooms that depend on other packages most. The newest
# versions are those of `make test`.
lowest: wheel-check
	$(BIN)/pip --python build/wheel-check/environment install --quiet --no-compile \
	  --requirement tests/lowest.txt pytest hypothesis psutil
	$(BIN)/pip --python build/wheel-check/environment check
	rm -r build/wheel-check/source/perta_fast build/wheel-check/source/kernels
	cd build/wheel-check/source && OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 ../environment/bin/python -m pytest $(LOWEST) \
	  -m 'not slow' -k 'not peak_memory and not (test_families and (unlearn or apply))' -p no:cacheprovider
	rm -rf build/wheel-check/environment build/wheel-check/source

$(VENV)/python:
	@command -v $(PYTHON) >/dev/null || { echo "perta_fast: $(PYTHON) was not found; install Python 3.11 to 3.13 or run: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))" || \
	  { echo "perta_fast: $$($(PYTHON) --version) is not supported; it takes 3.11 to 3.13: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
	  { echo "perta_fast: this Python cannot make virtual environments; install python3-venv"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "perta_fast: no C++ compiler was found; install g++ (Debian: apt install g++) or clang"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --upgrade pip  # that of Python 3.11 takes twice the time
	@touch $@

# torch comes first and exactly, so that nothing later chooses another build of it. Python compiles what is imported.
$(VENV)/torch: $(VENV)/python
	$(BIN)/pip install --quiet --no-compile torch==2.13.0
	@touch $@

$(VENV)/built: $(VENV)/torch pyproject.toml setup.py $(SOURCES)
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	@touch $@

clean:
	rm -rf build dist *.egg-info perta_fast/_C*.so
