# The two commands of the README. Each makes .venv when it is not there, or when pyproject.toml changed.
PYTHON ?= python3.11
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint types docs clean

demo: .venv/installed
	.venv/bin/fishr demo

test: .venv/installed-dev
	.venv/bin/python -m pytest

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/installed-dev
	.venv/bin/mypy

# The variable silences the notice that the theme ends in May 2027; Zensical, its successor, reads the same files.
docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs site
