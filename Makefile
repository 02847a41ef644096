.PHONY: quickstart test lint format docs
.DEFAULT_GOAL := test

quickstart:
	bash scripts/quickstart.sh

test:
	bash scripts/test.sh

lint:
	bash scripts/env.sh dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

format:
	bash scripts/env.sh dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs:
	bash scripts/env.sh dev
	.venv/bin/python docs/figures.py
	.venv/bin/python docs/from_code.py
	.venv/bin/mkdocs build --strict
