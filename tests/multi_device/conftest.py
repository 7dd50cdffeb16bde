"""A pytest session of its own with eight virtual CPU devices: `pytest tests/multi_device`.

The number of devices is fixed when jax starts, so these tests cannot share a process with those that expect one
device. Within the session they are ordinary tests, selected by name or file and shared out by `-n 2` like any other.
"""

import os
from pathlib import Path

import pytest
from support.processes import environment

os.environ.update(environment(8))


def pytest_collection_modifyitems(items):
    if any(not item.path.is_relative_to(Path(__file__).parent) for item in items):
        raise pytest.UsageError("tests/multi_device needs eight devices: run `pytest tests/multi_device` by itself")
