# make demo: train two adapters, serve them from one int8 backbone, ask each by name.   make test: all checks.
.PHONY: setup demo test lint unit interpreter test-slow test-oldest test-trainer test-gpu bench bench-serving bench-perplexity bench-cost bench-roofline bench-training bench-gpu bench-gpu-training proto clean
BIN := .venv/bin

setup:
	@.ci/setup

demo: setup
	$(BIN)/python benchmarks/demo.py

test: lint unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

UNIT := -m pytest -m "not slow and not gpu and not trainer" -n logical --maxprocesses 4 --dist loadfile

unit: setup interpreter
	$(BIN)/python $(UNIT)

# CUDA builds of torch bring triton; elsewhere its interpreter runs the CUDA kernels in the tests.
interpreter: setup
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet triton==3.7.1 || \
		echo 'triton cannot be installed here: the CUDA kernels are not tested' >&2

test-slow: setup
	$(BIN)/python -m pytest -m slow

# The oldest torch and transformers that pyproject.toml allows, and a numpy that the interpreter of that torch's Triton
# can use; torch comes with CUDA's libraries, 2.5 GB. PYTHON chooses the interpreter, as everywhere.
OLDEST := .venv-oldest

test-oldest:
	[ -x $(OLDEST)/bin/python ] || $${PYTHON:-python3} -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet torch==2.11.0
	VENV=$(OLDEST) .ci/setup
	$(OLDEST)/bin/python -m pip install --quiet transformers==5.17.0 'numpy<2.4'
	$(OLDEST)/bin/python $(UNIT)

test-trainer: setup
	$(BIN)/python -m pytest -m trainer -s tests/trainer_runs

test-gpu: setup
	$(BIN)/python -m pytest -m gpu tests/gpu

bench: setup
	$(BIN)/python benchmarks/cpu_table.py

bench-serving: setup
	$(BIN)/python benchmarks/serving.py

bench-gpu: setup
	$(BIN)/python benchmarks/gpu_kernels.py
	$(BIN)/python benchmarks/gpu_decode.py

bench-gpu-training: setup
	$(BIN)/python benchmarks/training.py --device cuda --shape llama-2-7b --steps 12 --out results/gpu_training.json --systems \
		"polyhead int8" "polyhead bfloat16" "transformers Trainer bfloat16" "llama-cookbook loop bfloat16"

bench-perplexity: setup
	$(BIN)/python benchmarks/perplexity.py

bench-cost: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/deployment_cost.py

bench-training: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[oracles]'
	$(BIN)/python benchmarks/training.py

bench-roofline: setup
	$(BIN)/python benchmarks/roofline.py --profile

proto: setup
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --pyi_out=proto --grpc_python_out=proto \
		proto/polyhead_proto/v1/*.proto

clean:
	rm -rf .venv $(OLDEST) build dist runs results .mypy_cache .ruff_cache .pytest_cache
