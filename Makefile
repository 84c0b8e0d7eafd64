# A fresh machine needs only `make demo` and `make test`; the other targets are their parts.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
DEMO_SIZE ?= 192
DEMO_EPOCHS ?= 42

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev demo test test-fast lint type clean

help:
	@echo "make demo       train, validate and detect on the embedded data set (minutes on a CPU)"
	@echo "make test       lint, types and tests"
	@echo "make setup      only .venv with requirements.txt    make lint | type | test-fast   parts of test"
	@echo "make clean      remove .venv and caches (runs/ and datasets/ stay)"

# Stamp files: pip runs again only when a requirements file changes.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	    { echo "error: FeatherDet needs Python 3.10 or newer as '$(PYTHON)'; name another one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "error: this Python has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -c 'import cv2' 2>/dev/null || { \
	    $(BIN)/python -c 'import cv2' 2>&1 | grep -qE 'lib(GL|gthread|glib|xcb|X11)[-.0-9a-zA-Z]*\.so' && \
	    echo "error: OpenCV's system libraries are missing; on Debian and Ubuntu: apt-get install libgl1 libglib2.0-0" >&2 || \
	    $(BIN)/python -c 'import cv2'; exit 2; }
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

setup: $(VENV)/.runtime
setup-dev: $(VENV)/.dev

# Each run starts afresh: runs/demo is removed first.
demo: $(VENV)/.runtime
	rm -rf $(DEMO)
	$(BIN)/python -m data.shapes
	$(BIN)/python train.py --cfg cfg/yolov5n-ghost.yaml --weights '' --data shapes \
	    --img $(DEMO_SIZE) --epochs $(DEMO_EPOCHS) --batch 16 \
	    --project $(DEMO) --name train
	$(BIN)/python val.py --weights $(DEMO)/train/weights/best.pt --data shapes --img $(DEMO_SIZE) \
	    --project $(DEMO) --name val
	$(BIN)/python detect.py --weights $(DEMO)/train/weights/best.pt --img $(DEMO_SIZE) \
	    --source 'datasets/shapes/val/*5.jpg' --project $(DEMO) --name images
	$(BIN)/python detect.py --weights $(DEMO)/train/weights/best.pt --img $(DEMO_SIZE) \
	    --source datasets/shapes/shapes.avi --project $(DEMO) --name video
	@$(BIN)/python -m benchmarks.demo $(DEMO)

test: lint type
	$(BIN)/python -m pytest --durations=20 --durations-min=1

# Under a minute: the parts without training, worker processes or whole models.
test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -x -q tests/test_architecture.py tests/test_readme.py tests/utils \
	    tests/data/index tests/data/convert tests/models/yaml tests/models/heads tests/models/losses

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
