# make train     install into .venv and train a small ConvFirst on the embedded digits; ARGS="..." adds Hydra overrides
# make test      install everything into .venv, check the style and run all CPU tests
# make gpu-test  run the tests marked gpu on this machine's GPU; writes results/gpu-tests.json
# make sanitize  run compute-sanitizer over the kernels; writes results/sanitizers.json
# make bench     run the benchmarks on this machine's GPU and redraw README's tables from results/
#
# PYTHON=python3 uses an interpreter that has the packages already, instead of .venv.

SYSTEM_PYTHON ?= python3
ARGS ?=
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt
KERNEL_SOURCES := $(shell find kernels/pyproject.toml kernels/CMakeLists.txt kernels/cmake kernels/csrc kernels/convfirst_kernels \
  -type f -not -name '*.pyc' -not -name '*.so' -not -name '*.json' 2>/dev/null)
KERNEL_TESTS := $(wildcard kernels/tests)

# The stamps are touched last, so an interrupted installation is taken up again and a finished one is not repeated.
ifdef PYTHON
  BASE :=
  EXTRAS :=
  FULL :=
else
  PYTHON := $(VENV)/bin/python
  BASE := $(VENV)/base.stamp
  EXTRAS := system-packages $(VENV)/full.stamp
  FULL := $(EXTRAS) $(if $(wildcard kernels/pyproject.toml),$(VENV)/kernels.stamp)
endif

# Scripts find the package where it isn't installed.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: train test style gpu-test sanitize bench system-packages clean

train: $(BASE)
	$(PYTHON) train.py $(ARGS)

test: style $(FULL)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 tests $(KERNEL_TESTS) $(ARGS)

# Before the kernels are compiled, which takes longest.
style: $(EXTRAS)
	$(PYTHON) -m ruff check .

gpu-test: $(FULL)
	$(PYTHON) scripts/gpu_test.py $(ARGS)

sanitize: $(FULL)
	$(PYTHON) scripts/sanitize.py $(ARGS)

bench: $(FULL)
	$(PYTHON) scripts/benchmark.py suite=cost
	$(PYTHON) scripts/benchmark.py suite=throughput $(ARGS)
	$(PYTHON) scripts/benchmark.py suite=latency $(ARGS)
	$(PYTHON) scripts/benchmark.py suite=blocks $(ARGS)
	$(PYTHON) scripts/benchmark.py suite=models $(ARGS)
	$(PYTHON) scripts/benchmark.py suite=winograd $(ARGS)
	$(PYTHON) scripts/benchmark.py suite=direct $(ARGS)
	-$(PYTHON) scripts/benchmark.py suite=counters $(ARGS)  # needs Nsight Compute's ncu; the others don't
	$(PYTHON) scripts/benchmark.py suite=training $(ARGS)
	$(PYTHON) scripts/benchmark.py suite=kernels_agreement $(ARGS)
	$(PYTHON) scripts/benchmark.py suite=training_throughput $(ARGS)
	$(PYTHON) scripts/benchmark.py suite=data_loading $(ARGS)
	$(PYTHON) scripts/render_results.py
	$(PYTHON) scripts/plan_cluster.py
	$(PYTHON) scripts/reproduce.py paper=convfirst measure=off

$(VENV)/bin/python:
	@$(SYSTEM_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(SYSTEM_PYTHON) is older than 3.10; name a newer one with SYSTEM_PYTHON=..." >&2; exit 1; }
	@$(SYSTEM_PYTHON) -c 'import ensurepip' || \
	  { echo "$(SYSTEM_PYTHON) cannot make virtual environments (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(SYSTEM_PYTHON) -m venv $(VENV)

$(VENV)/base.stamp: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

$(VENV)/full.stamp: $(VENV)/base.stamp
	$(PIP) --editable '.[ffcv,slurm,dev]'
	@touch $@

$(VENV)/kernels.stamp: $(VENV)/full.stamp $(KERNEL_SOURCES)
	$(PIP) ./kernels
	@touch $@

# FFCV is compiled against these; training without FFCV needs none of them.
system-packages:
	@command -v c++ >/dev/null || { echo "a C++ compiler is missing (on Debian: apt-get install g++)" >&2; exit 1; }
	@command -v pkg-config >/dev/null || { echo "pkg-config is missing (on Debian: apt-get install pkg-config)" >&2; exit 1; }
	@pkg-config --exists opencv4 || \
	  { echo "OpenCV's headers are missing (on Debian: apt-get install libopencv-dev)" >&2; exit 1; }
	@pkg-config --exists libturbojpeg || \
	  { echo "libturbojpeg's headers are missing (on Debian: apt-get install libturbojpeg0-dev)" >&2; exit 1; }

clean:
	rm -rf $(VENV)
