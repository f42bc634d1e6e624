# Apprentice. `make distill` and `make test` need nothing but Python 3.11-3.13 and PyPI: the first run makes .venv.
#
#   make distill [ARGS="..."]     the whole loop: launch/distill.py
#   make test    [ARGS="..."]     the fast test suite; `make test-slow` runs the rest, ARGS go to pytest
#   make lint                     ruff and pyright
#   make install [BUILD=gpu]      only the environment: requirements-$(BUILD).lock, cpu unless told otherwise
#   make lock    [UPGRADE=-U]     resolve both lock files again; versions stay as they are unless UPGRADE is given
#   make clean / make distclean   remove caches and build products / .venv too. Neither touches runs/

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help distill test test-slow lint install lock clean distclean

BUILD ?= cpu
LOCK := requirements-$(BUILD).lock
PY := .venv/bin/python
# Where PyTorch keeps its CPU builds; PyPI has the CUDA builds only.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
UV_VERSION := 0.13.8

# The first interpreter that fits; `make PYTHON=/path/to/python3.12` overrides.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(FITS)' 2>/dev/null && { echo $$p; break; }; done)

# The stamp names the lock's content: an installed lock is not installed again, a changed one is.
STAMP := .venv/.installed-$(shell cksum $(LOCK) 2>/dev/null | cut -d' ' -f1)
PIP_INSTALL := $(PY) -m pip install -qq --no-deps --no-input --disable-pip-version-check

# Nothing that we start reports anywhere.
export DO_NOT_TRACK := 1
export RAY_USAGE_STATS_ENABLED := 0
export VLLM_NO_USAGE_STATS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

help:
	@sed -n 's/^#  *make /make /p' Makefile

distill: $(STAMP)
	$(PY) launch/distill.py $(ARGS)

test: $(STAMP)
	$(PY) -m pytest -m "not slow" -n 2 --dist loadgroup --no-loadscope-reorder $(ARGS)

test-slow: $(STAMP)
	$(PY) -m pytest -m slow $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m pyright

install: $(STAMP)

# A venv is made only where none works, so that an interrupted run goes on where it stopped.
define MAKE_VENV
[ -n "$(PYTHON)" ] && "$(PYTHON)" -c '$(FITS)' 2>/dev/null || { \
	echo "error: Python 3.11, 3.12 or 3.13 is needed, found: '$(PYTHON)' $$("$(or $(PYTHON),python3)" --version 2>&1);" \
		"say make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
$(PY) -m pip --version >/dev/null 2>&1 || { echo "[.venv] new, $$("$(PYTHON)" --version)"; "$(PYTHON)" -m venv .venv; }
endef

# torch comes first and by itself: pip's configured places are asked, then PyTorch's own index. No other package may
# come from there, and a machine that cannot reach it learns so within seconds.
# A package whose installation was cut off has no RECORD: it is forgotten here, and so installed again.
# Apprentice itself comes last, as a line in a .pth file (editable_mode=compat), so that configs/ is found like a package.
$(STAMP):
	@[ -f $(LOCK) ] || { echo "error: BUILD is cpu or gpu, not '$(BUILD)': there is no $(LOCK)" >&2; exit 1; }
	@$(MAKE_VENV)
	@rm -f .venv/.installed-*
	@for d in .venv/lib/python3*/site-packages/*.dist-info; do [ -e "$$d/RECORD" ] || rm -rf "$$d"; done
	@torch="$$(sed -n "/^torch==.*+cpu/p" $(LOCK))"; [ -z "$$torch" ] || { \
		echo "[.venv] $${torch%% *}"; \
		$(PIP_INSTALL) --retries 1 "$$torch" 2>/dev/null || \
		$(PIP_INSTALL) --retries 1 --timeout 30 --extra-index-url $(TORCH_INDEX) "$$torch"; }
	@echo "[.venv] $$(grep -c '==' $(LOCK)) pinned packages from $(LOCK); the first time this takes 2 to 4 minutes"
	@$(PIP_INSTALL) -r $(LOCK)
	@$(PIP_INSTALL) --no-build-isolation --config-settings editable_mode=compat -e .
	@touch $@ && echo "[.venv] ready"

.venv/bin/uv:
	@$(MAKE_VENV)
	@$(PIP_INSTALL) uv==$(UV_VERSION)

# Both locks start from the extras in pyproject.toml. The CPU lock also obeys [tool.uv] there: torch as its CPU build
# describes itself, without what only CUDA builds use. The GPU lock is resolved without it, as PyPI has it.
COMPILE := .venv/bin/uv pip compile -q --no-header --annotation-style line --python-version 3.11 $(UPGRADE) --extra dev
lock: .venv/bin/uv
	@cp requirements-cpu.lock .venv/cpu.lock 2>/dev/null || :
	@cp requirements-gpu.lock .venv/gpu.lock 2>/dev/null || :
	$(COMPILE) --universal --extra cpu pyproject.toml -o .venv/cpu.lock
	$(COMPILE) --no-config --python-platform x86_64-manylinux_2_28 --extra gpu pyproject.toml -o .venv/gpu.lock
	@{ echo "# Written by 'make lock' from pyproject.toml [cpu,dev]; do not edit. Python 3.11-3.13, Linux x86_64 and aarch64;"; \
	   echo "# macOS gets everything but vLLM. Install with 'make install': whole list, pip --no-deps, torch first (see Makefile)."; \
	   sed -E "s/^torch==([0-9.]+) .*/torch==\1+cpu ; sys_platform == 'linux'\ntorch==\1 ; sys_platform != 'linux'/" \
	       .venv/cpu.lock; } > requirements-cpu.lock
	@{ echo "# Written by 'make lock' from pyproject.toml [gpu,dev]; do not edit. Python 3.11, Linux x86_64, CUDA 13."; \
	   echo "# Resolved from package metadata alone: this list has not yet been installed or run on a GPU machine."; \
	   cat .venv/gpu.lock; } > requirements-gpu.lock

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -not -path './runs/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
