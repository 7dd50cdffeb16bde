"""Log handlers. Modules call `logging.getLogger(__name__)`; the command line and training runs attach handlers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from internvl_jax.utils.progress import err, printable

logger = logging.getLogger(__name__)

# The loggers of this project, and the one that Python's `warnings` are sent to.
LOGGERS = ("internvl_jax", "checkpoints_convert", "tpu_scripts", "py.warnings")


@cache
def warn_once(message: str) -> None:
    """Log a warning the first time that it is given, once per process. `warn_once.cache_clear()` forgets them."""
    logger.warning("%s", message)


class _Terminal(logging.Handler):
    """Prints records on stderr, above a progress bar if one is running."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
            err.print(prefix + printable(record.getMessage()))
        except Exception:
            self.handleError(record)


@contextmanager
def to_terminal() -> Iterator[None]:
    """Show records of level INFO and above on stderr, with warnings of Python and of libraries."""
    before = warnings.showwarning
    warnings.showwarning = _log_warning
    try:
        with _attached(_Terminal()):
            yield
    finally:
        warnings.showwarning = before


def _log_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    """As `logging.captureWarnings`, without the source line.

    PIL's warnings about metadata do not name the file, and what cannot be read raises an error that does: they are
    logged at level DEBUG.
    """
    level = logging.DEBUG if Path(filename).parent.name == "PIL" else logging.WARNING
    logging.getLogger("py.warnings").log(level, "%s", message)


@contextmanager
def to_file(path: Path) -> Iterator[None]:
    """Append records of level INFO and above, with their time, to `path`."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="replace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    try:
        with _attached(handler):
            yield
    finally:
        handler.close()


@contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    handler.setLevel(logging.INFO)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
