# make demo: sets up and trains CartPole-v1 to solved.  make test: sets up and passes all tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
PYTEST_ARGS ?= -n 2 --dist worksteal

export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: install demo test lint unit soak fuzz bench-learning bench-peers bench-async bench-speed bench-plan bench-gpu bench-scaling mutants docs clean

install: $(STAMP)

# torch first, on its own: pip then keeps a CPU build that lies in its find-links, and asks for no accelerator's libraries.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt '$(TORCH)'
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[atari,box2d,mujoco,ray-jobs,plan,storage,dev]'
	touch $(STAMP)

demo: install
	$(BIN)/shoal train CartPole-v1
	$(BIN)/shoal evaluate latest

test: lint unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports --no-logo

# Compiled first, so that no process of a test does it anew, where Python is told to write no bytecode (PYTHONDONTWRITEBYTECODE).
unit: lint
	$(BIN)/python -m compileall -q src
	$(BIN)/pytest -m 'not soak' $(PYTEST_ARGS)

soak: install
	$(BIN)/python benchmarks/soak.py; first=$$?; $(BIN)/python benchmarks/soak_files.py && $(BIN)/python benchmarks/soak_faults.py && $(BIN)/python benchmarks/soak_hosts.py && exit $$first

# Minutes of atheris on everything that reads bytes. FUZZ_ARGS="--seconds 600 word" for one decoder, longer.
fuzz: install
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[fuzz]'
	$(BIN)/python benchmarks/fuzz.py $(FUZZ_ARGS)

bench-learning: install
	$(BIN)/python benchmarks/learning.py
	$(BIN)/python benchmarks/summary.py

# Other libraries beside shoal, in turn. PEERS_ENV=DIR: their virtual environment (made where missing); PEERS_SCRIPTS=DIR: their scripts.
bench-peers: install
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/summary.py

bench-async: install
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/asynchrony.py

# On a machine with a CUDA device.
bench-gpu: install
	$(BIN)/python benchmarks/gpu.py

bench-speed: install
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/summary.py

bench-plan: install
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/summary.py

# Clusters of Ray on this machine. Rows on hosts need root and iproute2; without them they are left out, and the table says why.
bench-scaling: install
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/summary.py

mutants: install
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[mutants]'
	$(BIN)/mutmut run
	$(BIN)/python benchmarks/mutants.py

docs: install
	$(BIN)/python -m shoal.cli.reference > docs/reference.md

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis mutants
