# `make demo` and `make test` need Python 3.10 or newer and nothing else: they build a virtual environment of their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST_TRITON := 3.6.0

.PHONY: demo test test-rest lint smoke bench docs pictures clean device

demo: $(READY) device
	$(BIN)/fastunet demo --out demo

test: $(READY) device
	$(BIN)/python -m tests

test-rest: $(READY)
	$(BIN)/python -m tests --rest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY) device
	$(BIN)/python -m pytest bench --benchmark-only

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/docs

# The README's segmentation is the median case of a demo, whose picture is written first.
pictures: $(READY)
	$(BIN)/python docs/figures.py
	$(BIN)/fastunet demo --out build/pictures
	cp "$$(ls -tr build/pictures/segmentation/*.png | head -n 1)" docs/pictures/segmentation.png

# The wheel, in an environment that holds nothing else, away from the checkout.
smoke: $(READY)
	rm -rf build/smoke dist && $(BIN)/python -m build --wheel --no-isolation
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd build/smoke && bin/python -c "import torch, fastunet; \
		print(fastunet.UNet().predict(torch.zeros(1, 2, 64, 64)).shape)" && bin/fastunet info

device:
	@if command -v nvidia-smi >/dev/null && nvidia-smi -L; then :; else echo "No NVIDIA driver found: running on the CPU."; fi

$(READY): pyproject.toml constraints.txt tests/oldest.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools --editable ".[test,rivals,dev]"
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/triton-$(OLDEST_TRITON) triton==$(OLDEST_TRITON)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/oldest --requirement tests/oldest.txt
	touch $@

clean:
	rm -rf $(VENV) build dist demo
