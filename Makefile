# Each target makes the environment that it needs. Two cores, no GPU.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: finetune test test-all lint notebooks course book bench gpu bench-gpu fuzz mutation clean

finetune: .venv/minift  ## the built-in model learns to answer questions, in about a minute
	$(BIN)/minift finetune

test: lint  ## everything that CI runs
	$(PYTEST) -m "not slow"

test-all: lint  ## also what takes minutes: the real model, random kills
	$(PYTEST)

lint: .venv/minift-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: .venv/minift-test  ## the notebooks from their texts, with outputs; ONLY=05
	$(BIN)/python notebooks/build.py $(ONLY)

course: .venv/minift-notebook  ## the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

book: .venv/minift-book  ## notebooks, lessons and API as a web site, to be read without a network: build/book/index.html
	$(BIN)/python notebooks/book/build.py

bench: .venv/minift-test  ## minift beside its peers on this machine; MODEL=file.gguf for training steps and generation
	$(BIN)/python benchmarks/cpu.py $(if $(MODEL),--model $(MODEL))

gpu:  ## on a machine with a GPU, in its own Python: every property in every type, 200 repeats, compute-sanitizer
	PYTHONPATH=.:kernels:tests $(PYTHON) -m pytest -q tests/kernels/test_kernel_gpu.py

bench-gpu:  ## there too: every kernel beside its peers and the machine's limits, as JSON
	PYTHONPATH=.:kernels $(PYTHON) kernels/benchmarks/run.py

fuzz: .venv/minift-test  ## every reader on damaged files: what became of them, as a table
	MINIFT_FUZZ=$${MINIFT_FUZZ:-10} OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/io/test_fuzz.py

mutation: .venv/minift-test  ## does each changed line of minift/quant and minift/peft fail a test? takes a while
	$(BIN)/python -m tests.mutation minift/quant tests/quant minift/peft tests/peft --jobs 2

.venv/minift: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/minift-test: .venv/minift
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

.venv/minift-notebook: .venv/minift
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[notebook]'
	touch $@

.venv/minift-book: .venv/minift
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[book]'
	touch $@

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis
