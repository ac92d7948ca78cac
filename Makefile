# `make demo` and `make test` do all their own set-up. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
KERNELS := $(VENV)/.kernels
NATIVE := ultramem/ops/native
DEMO_OUT ?= runs/demo
DEMO_DISTRIBUTED_OUT ?= runs/demo_distributed

.PHONY: help demo demo-distributed experiment test test-slow test-faults static static-check gpu gpu-dry-run tensorrt tensorrt-dry-run benchmarks lint format clean

help:
	@echo "make demo    train, compare, export and profile a small model; ends with the path of an HTML report"
	@echo "make demo-distributed  train on two ranks, kill one, resume; ends with the path of a page of the losses, two minutes"
	@echo "make experiment  train and compare the families and the switches of UltraMem, two hours; writes docs/experiment"
	@echo "make test    the tests"
	@echo "make test-slow  the tests of over a minute"
	@echo "make test-faults  the tests of lost, hanging and differing ranks and of their checkpoints, ten times in a row"
	@echo "make static-check  compile the GPU kernels, count launches and bytes: fails where a figure is worse than committed"
	@echo "make static  write those figures anew, and docs/static.md"
	@echo "make gpu     tests and benchmarks on a GPU in nine minutes; needs torch, triton and pytest under PYTHON alone"
	@echo "make gpu-dry-run  the same script on a CPU, on small shapes, in Triton's interpreter"
	@echo "make tensorrt  build, check and time TensorRT engines on a machine that has TensorRT and a GPU under PYTHON"
	@echo "make tensorrt-dry-run  the same steps with a stand-in for TensorRT, on tiny models"
	@echo "make benchmarks  every CPU benchmark, half an hour on two quiet cores; writes benchmarks/results and docs"
	@echo "make lint    ruff and mypy"
	@echo "make format  ruff format"
	@echo "make clean   remove the virtual environment and caches (runs/ stays)"

demo: $(KERNELS)
	$(BIN)/python examples/demo.py --out $(DEMO_OUT)

demo-distributed: $(KERNELS)
	$(BIN)/python examples/demo_distributed.py --out $(DEMO_DISTRIBUTED_OUT)

# Goes on where it was stopped.
experiment: $(KERNELS)
	$(BIN)/python examples/experiment.py --publish docs/experiment/raw
	$(BIN)/python docs/experiment/make_page.py

# Two workers of one thread each: the tests are many small programs, and spinning OpenMP threads would fight over cores.
test: $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-faults: $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --repeat 10 tests/distributed/test_faults.py tests/distributed/test_checkpoint.py

# Three tools, one table: what ptxas makes of the kernels, launches of a layer, bytes that the kernels ask for.
# The check compiles what changed since the table was made, and a sample of the rest; `make static` compiles everything.
static: MODE = --update
static-check: MODE = --check
static-check: PART = --quick
static static-check: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.offline_gate $(MODE) $(PART)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.launches $(MODE)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m benchmarks.traffic $(MODE)
	$(if $(filter static,$@),$(BIN)/python -m benchmarks.static_page)

# Without the virtual environment: on a rented machine nothing is installed, the image has what it takes.
gpu:
	$(PYTHON) -m benchmarks.gpu

gpu-dry-run: $(KERNELS)
	OUT=$(or $(OUT),runs/gpu) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gpu --dry-run

# On a machine that has it: torch with CUDA, triton, tensorrt, onnx, onnxscript and onnxruntime under PYTHON.
tensorrt:
	$(PYTHON) -m benchmarks.tensorrt

tensorrt-dry-run: $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.tensorrt --dry-run --peers onnx --rounds 3

benchmarks: $(KERNELS)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.run --suite cpu --publish
	$(BIN)/python -m benchmarks.report

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first and pinned, so that nothing else draws in another build of it.
$(READY): pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[onnx,triton,dev]'
	touch $@

# The install has built them; this is for whoever edits them.
$(KERNELS): $(READY) $(wildcard $(NATIVE)/*.h $(NATIVE)/*.cc $(NATIVE)/onnx/*.* $(NATIVE)/onnx/cuda/*) $(NATIVE)/build.py
	$(BIN)/python -m ultramem.ops.native.build
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache $(NATIVE)/*.so
