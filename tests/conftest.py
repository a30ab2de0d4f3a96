"""The shared fixtures, for all processes but the one that only deals the tests out to others."""

import gc

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        gc.disable()  # what is imported stays: to look through it takes a fifth of the start
        config.pluginmanager.import_plugin("tests.shared")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
