"""Processes that run tests have Megatron; the one that hands them out to others does without."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Import it, unless pytest's own processes (``-n``) run the tests: each of those does."""
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.megatron_once")
