"""A full disk for what this project writes. The limits of the process that runs the tests stay as they are."""

import errno
import os
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def full_disk(limit):
    """No file grows beyond `limit` bytes: a write that does not fit is cut short, and then there is no space left."""
    write, write_bytes = os.write, Path.write_bytes

    def write_some(file, data):
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            return write(file, data)
        if status.st_size >= limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[: limit - status.st_size])

    def write_file(path, data):
        write_bytes(path, data[:limit])
        if len(data) > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", write_some)
        patch.setattr(Path, "write_bytes", write_file)
        yield
