"""Flags of the TPU compiler, by chip generation: those that the scripts of `tpu_scripts` set on the machines."""

from __future__ import annotations

import re
from pathlib import Path

DEFAULT, NONE = "default", "none"
FILE = Path(__file__).with_name("libtpu_flags.env")  # read by shell scripts too


def compiler_flags(text: str, generation: str) -> dict[str, str]:
    """Return flags as `jax.stages.Lowered.compile` takes them.

    Args:
        text: "default" for those of the generation, "none", or flags such as "--xla_a=true --xla_b=2".
        generation: Name of the chip, for example "v5e".

    Raises:
        ValueError: A flag is not written as --NAME=VALUE.
    """
    if text == NONE:
        return {}
    if text == DEFAULT:
        match = re.search(rf'^LIBTPU_FLAGS_{generation}="(.*)"$', FILE.read_text(), re.MULTILINE)
        if match is None:
            raise ValueError(f"{FILE} has no LIBTPU_FLAGS_{generation}")
        text = match[1]
    flags = {}
    for flag in text.split():
        parts = re.fullmatch(r"--(\w+)=(\S+)", flag)
        if parts is None:
            raise ValueError(
                f"flag {flag!r} is not understood: write {DEFAULT}, {NONE}, or --NAME=VALUE, separated by spaces"
            )
        flags[parts[1]] = parts[2]
    return flags
