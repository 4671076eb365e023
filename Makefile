# Two commands on a fresh machine with python3, g++ and make: `make demo`, `make test`. Both set up ./.venv first.
# Variables: PYTHON (default python3), TORCH_FLAGS (extra pip options for torch, e.g. an --index-url for a CPU build),
# FASTCAM_BUILD_EXT and FASTCAM_BUILD_CUDA (docs/environment.md; changing them rebuilds).

PYTHON ?= python3
TORCH_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := $(VENV)/.packages
BUILT := $(VENV)/.built-ext=$(or $(FASTCAM_BUILD_EXT),auto)-cuda=$(or $(FASTCAM_BUILD_CUDA),auto)
SOURCES := pyproject.toml setup.py kernels/__init__.py $(shell find csrc -type f)

.PHONY: venv demo test test-computes test-library test-triton test-peers lint format typecheck bench micro faithfulness gpu-check clean

venv: $(BUILT)

# torch comes first and exactly: an unpinned torch resolves to another build with gigabytes of libraries. torchvision comes
# without dependencies for the same reason.
$(PACKAGES): constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools wheel ninja pybind11
	$(BIN)/pip install -q -c constraints.txt $(TORCH_FLAGS) torch==2.13.0 numpy
	$(BIN)/pip install -q -c constraints.txt $(TORCH_FLAGS) --no-deps torchvision==0.28.0
	$(BIN)/pip install -q -c constraints.txt triton pillow matplotlib scikit-learn scikit-image safetensors \
	  pytest pytest-benchmark ruff mypy
	$(BIN)/pip install -q -c constraints.txt zarr pyarrow pandas ray
	touch $@

$(BUILT): $(PACKAGES) $(SOURCES)
	rm -f $(VENV)/.built-*
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	@$(BIN)/python -P -m fastcam.info --brief
	touch $@

demo: venv
	$(BIN)/fastcam demo

# Three processes, one after another or (`make -j3 -O test`) side by side: what computes, what stands around it, and the
# Triton kernels, which are decorated for the interpreter or not at all.
COMPUTES := tests/ops tests/methods tests/program

test: test-computes test-library test-triton

test-computes: venv
	$(BIN)/pytest -q $(COMPUTES)

test-library: venv
	$(BIN)/pytest -q tests $(COMPUTES:%=--ignore=%) --ignore=tests/triton

test-triton: venv
	TRITON_INTERPRET=1 $(BIN)/pytest -q tests/triton

# The libraries that fastcam.adapters stands in for, and what importing them takes; without dependencies, since theirs
# would bring another torch, opencv with its windows, and TensorFlow. Then what models, data sets and stores may come
# from or go to. A file of its own: the other targets do without.
PEERS := $(VENV)/.peers

$(PEERS): $(PACKAGES)
	$(BIN)/pip install -q -c constraints.txt --no-deps grad-cam torchcam captum zennit quantus \
	  ttach tqdm opencv-python-headless pandas cachetools
	$(BIN)/pip install -q -c constraints.txt timm transformers datasets xarray
	touch $@

test-peers: venv $(PEERS)
	$(BIN)/pytest -q -m peers tests

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

typecheck: venv
	$(BIN)/mypy

# Every method on the testbed by every metric, minutes; then docs/faithfulness.md from the committed results.
faithfulness: venv
	$(BIN)/python -P benchmarks/faithfulness/bench_table.py --model tiny_resnet
	$(BIN)/python -P benchmarks/faithfulness/bench_table.py --model tiny_vgg
	$(BIN)/python -P benchmarks/readme.py

bench: venv
	for suite in benchmarks/*/bench_*.py; do $(BIN)/python -P $$suite || exit 1; done
	$(BIN)/python -P benchmarks/readme.py
	$(BIN)/python -P benchmarks/plots.py
	$(MAKE) micro

micro: venv
	$(BIN)/pytest -q benchmarks/micro --benchmark-min-rounds=20 --benchmark-columns=median,iqr,rounds --benchmark-sort=name

gpu-check:
	.ci/gpu-check.sh

clean:
	rm -rf $(VENV) build dist out *.egg-info fastcam/_C.*.so fastcam/_build.json .pytest_cache .mypy_cache .ruff_cache .benchmarks
