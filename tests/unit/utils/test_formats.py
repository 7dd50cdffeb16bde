"""Numbers as reports and messages show them."""

from __future__ import annotations

import pytest

from internvl_jax.utils import formats


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.01234, "0.0123"),
        (1.5, "1.50"),
        (12.345, "12.3"),
        (99.96, "100"),
        (12345.6, "12,346"),
        (-250.4, "-250"),
        (1.234e-6, "1.23e-06"),
        (float("nan"), "nan"),
    ],
)
def test_number(value, shown):
    assert formats.number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.01234, "12.3 ms"), (1, "1.00 s"), (119, "119 s"), (750, "12.5 min"), (11700, "3.25 h"), (400_000, "111 h")],
)
def test_duration(seconds, shown):
    assert formats.duration(seconds) == shown


@pytest.mark.parametrize(
    ("size", "in_memory", "on_disk"),
    [
        (512, "512 B", "512 B"),
        (1000, "1000 B", "1.00 kB"),
        (15.75 * 2**30, "15.75 GiB", "16.91 GB"),
        (5e15, "4547.47 TiB", "5000.00 TB"),
    ],
)
def test_bytes(size, in_memory, on_disk):
    assert formats.memory(size) == in_memory
    assert formats.disk(size) == on_disk


@pytest.mark.parametrize(("count", "shown"), [(512, "512"), (2_216_704, "2.22M"), (19_110_000_000, "19.11B")])
def test_parameters(count, shown):
    assert formats.parameters(count) == shown
