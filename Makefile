# `make` lists the targets. Two commands are enough for a start: `make demo-video`, `make test`.
# TORCH is a list of pip arguments; on a machine without an NVIDIA GPU this one saves gigabytes:
#   make install TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH   ?= torch==2.13.0
PYTHON  ?= python3
VENV    ?= .venv
EXTRAS  ?= dev
# processes that run tests, one thread each
WORKERS ?= 2
# that `make results` may take
MINUTES ?= 180

BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST  := $(THREADS) $(BIN)/pytest -q -n $(WORKERS) --dist loadfile

.PHONY: help install browser demo-video test test-all results lint clean
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  \1\t/' | expand -t 16

install: $(STAMP)  ## the virtual environment, torch and this checkout, editable; once, and again when pyproject.toml changes

$(STAMP): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install "setuptools>=77" wheel
	$(BIN)/python -m pip install --no-build-isolation -e ".[$(EXTRAS)]"
	touch $@

browser:  ## Debian's Chromium for the page's test, where this user may install it; without one that test skips
	@if ! { command -v chromium && command -v chromedriver; } >/dev/null; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
				chromium chromium-driver >/dev/null; } || echo "chromium could not be installed"; \
		fi; \
	fi

demo-video: install  ## demo.mp4 from the embedded model: no GPU and no network needed
	$(BIN)/streamgen render --prompt "a red circle bouncing on a navy background" --seconds 5 -o demo.mp4
	@echo "$(CURDIR)/demo.mp4"

test: lint browser  ## the linter and the quick tests
	$(PYTEST) -m "not slow" tests

test-all: lint browser  ## the slow tests as well
	$(PYTEST) tests

results: install  ## docs/results.md, measured in MINUTES; the same again measures what is missing
	$(BIN)/python benchmarks/results.py --minutes $(MINUTES)

lint: install  ## ruff
	$(BIN)/ruff check .

clean:  ## build products and caches; the virtual environment and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache demo.mp4 demo.json
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
