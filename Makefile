.PHONY: quickstart test lint format
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
