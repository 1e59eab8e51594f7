# make demo    install, prepare, train, average, export and synthesize: from nothing to hello.wav
# make test    all tests
# make quick   the tests that take under two minutes
# make check   lint, types, import contracts and tests
# make chaos   harm of every kind to small runs, within 25 minutes; make fuzz: damaged files only
# make test-gpu, make bench-gpu    the tests and the benchmark that need a GPU
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
RUN := runs/demo
TEXT ?= hello, the red lamp behind the house is old.

.PHONY: demo test quick chaos fuzz check lint format test-gpu bench-gpu clean

demo: $(VENV)/demo.stamp
	$(BIN)/python -m cosyexp.prepare
	$(BIN)/python -m cosyexp.train -m model=llm,flow,hifigan
	$(BIN)/python -m cosyexp.average -m run_dir=$(RUN)/llm,$(RUN)/flow,$(RUN)/hifigan
	$(BIN)/python -m cosyexp.export -m run_dir=$(RUN)/llm,$(RUN)/flow,$(RUN)/hifigan weights=average
	$(BIN)/python -m cosyexp.synthesize backend=onnx out=hello.wav text="$(TEXT)" llm=$(RUN)/llm flow=$(RUN)/flow hifigan=$(RUN)/hifigan
	@echo
	@echo "data/demo_50hz         the prepared demo corpus"
	@echo "$(RUN)/<model>       the three runs: metrics.jsonl, logs, checkpoints, averages, exports"
	@echo "$(BIN)/tensorboard --logdir runs       curves, mel spectrograms, audio"
	@echo "hello.wav              \"$(TEXT)\", synthesized by the exported models"

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 $(ARGS)

quick: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m quick --numprocesses=auto --maxprocesses=4 $(ARGS)

chaos: $(VENV)/dev.stamp
	$(BIN)/python -m tests.chaos $(ARGS)

fuzz: $(VENV)/dev.stamp
	$(BIN)/python -m tests.chaos --only fuzz --minutes 60 --fuzz-seconds 60 $(ARGS)

check: lint test

test-gpu: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m gpu tests/gpu --numprocesses=4 $(ARGS)

bench-gpu: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/gpu.py $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Installs onnxruntime for CPUs, unless onnxruntime-gpu is installed: both write to the same folder.
$(VENV)/demo.stamp: requirements-cpu.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import deepspeed, onnxruntime" 2>/dev/null || $(PIP) --requirement requirements-cpu.txt
	$(PIP) --no-deps --editable .
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip uninstall --quiet --yes onnxruntime 2>/dev/null
	$(PIP) --editable ".[dev]"
	$(PIP) --no-deps openai-whisper   # only for its vocabulary
	$(PIP) --no-deps resemblyzer distillmos xls-r-sqa   # only for their weights, see docs/evaluate.md
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
