"""Measured numbers as people read them, in reports and messages. JSON has them raw, with the unit in the name.

What a format specification says needs no function: counts are `{count:,}`, estimated ones `{count:,.0f}`, shares
`{share:.1%}`, errors and tolerances `{error:.1e}`, losses `{loss:.4f}`, scores `{score:.1f}` as published. Settings are
shown as they were given.
"""

from __future__ import annotations


def number(value: float) -> str:
    """Format a rate or a ratio with three significant digits, and never less than its whole part.

    Examples: "0.0123", "1.50", "12.3", "12,346".
    """
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def duration(seconds: float) -> str:
    """Format a time in the unit that suits it: "12.3 ms", "45.0 s", "12.5 min", "3.25 h"."""
    if seconds < 1:
        return f"{number(1e3 * seconds)} ms"
    if seconds < 120:
        return f"{number(seconds)} s"
    return f"{number(seconds / 60)} min" if seconds < 7200 else f"{number(seconds / 3600)} h"


def memory(size: float) -> str:
    """Format bytes of memory in powers of 1024, as device memory is sold: "15.75 GiB"."""
    return _scaled(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def disk(size: float) -> str:
    """Format bytes of files in powers of 1000, as model hubs show them: "38.22 GB"."""
    return _scaled(size, 1000, ("B", "kB", "MB", "GB", "TB"))


def parameters(count: float) -> str:
    """Format a number of parameters: "19.11B", "2.22M"."""
    return _scaled(count, 1000, ("", "K", "M", "B", "T")).replace(" ", "")


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    """Format a value with two decimals in the largest unit of which it has at least one."""
    power = 0
    while abs(value) >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:.2f} {units[power]}" if power else f"{value:.0f} {units[0]}"
