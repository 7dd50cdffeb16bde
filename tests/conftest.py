"""What every test runs under."""

import gc
import logging
import os
import signal

import pytest
from support.compiler import compile_fast, share_compiled_programs
from support.paths import SUPPORT

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu, where it is installed, would look for a TPU first
os.environ.setdefault("OMP_NUM_THREADS", "1")  # products this small run slower when torch splits them between threads
compile_fast()
share_compiled_programs()

# Processes that tests start find `support` as this one does.
os.environ["PYTHONPATH"] = os.pathsep.join([str(SUPPORT.parent), *filter(None, [os.environ.get("PYTHONPATH")])])

# A shell's background job ignores Ctrl-C, and one under nohup SIGHUP; so would every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


LONG = ("test_nano_learns_a_new_question", "test_two_processes", "test_the_command_on_two_processes")


def pytest_collection_modifyitems(items):
    """Minutes-long tests first: begun last, they would leave the other worker without work."""
    items.sort(key=lambda item: not item.name.startswith(LONG))  # stable: the others stay in order


def pytest_collection_finish():
    """Modules stay: the garbage collector need not look through them hundreds of times while programs are traced."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


class _Messages(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def logged():
    """The warnings that this project's loggers get during a test, as a list of texts."""
    handler = _Messages()
    logging.getLogger("internvl_jax").addHandler(handler)
    logging.getLogger("checkpoints_convert").addHandler(handler)
    yield handler.texts
    logging.getLogger("internvl_jax").removeHandler(handler)
    logging.getLogger("checkpoints_convert").removeHandler(handler)


@pytest.fixture(autouse=True)
def no_ignored_fields(request):
    """No golden config.json has a field that is ignored: a test that wants one asks for `logged`."""
    handler = _Messages()
    logger = logging.getLogger("internvl_jax.config.hf")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    if "logged" not in request.fixturenames and "run" not in request.fixturenames:
        assert not handler.texts
