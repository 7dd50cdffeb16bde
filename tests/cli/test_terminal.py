"""`internvl-jax` in a terminal and in pipes, as processes: Ctrl-C, paste, readers that leave."""

import os
import pty
import re
import select
import subprocess
import time

from support.cli_cases import GOLDEN, IMAGE, QUESTION, SEEN, TEXT, process

ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x08")  # colors and moves of the cursor


class Terminal:
    """`internvl-jax` in a pseudo-terminal of its own, which is its controlling one: Ctrl-C typed there reaches it."""

    def __init__(self, cache, *argv, code=""):
        self.fd, terminal = pty.openpty()
        # The leader of a session gets the first terminal that it opens.
        code = f"import os; os.close(os.open(os.ttyname(0), os.O_RDWR))\n{code}"
        options = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
        self.process = process(cache, *argv, code=code, start_new_session=True, **options)
        os.close(terminal)
        self.seen = ""

    def expect(self, text, seconds=120):
        """Wait for a text on the screen; what was shown up to its end is then forgotten."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.fd], [], [], left)[0]:
                raise AssertionError(f"{text!r} did not come; shown: {self.seen!r}")
            try:
                self.seen += ESCAPES.sub("", os.read(self.fd, 65536).decode("utf-8", "replace"))
            except OSError:
                raise AssertionError(f"ended before {text!r}; shown: {self.seen!r}") from None
        shown, _, self.seen = self.seen.partition(text)
        return shown

    def send(self, text):
        os.write(self.fd, text.encode())

    def leave(self):
        """Read what is left and return the exit code."""
        try:
            while data := os.read(self.fd, 65536):
                self.seen += data.decode("utf-8", "replace")
        except OSError:
            pass
        return self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


# Tokens come one by one, with time in between to interrupt them.
SLOW = """
import time
from internvl_jax.inference import chat
from internvl_jax.inference.generation import generator
chat.STREAM_CHUNK = 1
decode = generator.Generator.decode
generator.Generator.decode = lambda *args: time.sleep(0.25) or decode(*args)
"""


def test_a_session_in_a_terminal(cache, converted):
    """Ctrl-C stops the answer and not the program, and an empty line's Ctrl-C only says how to leave."""
    with Terminal(cache, *converted, code=SLOW) as terminal:
        assert "loading" in terminal.expect("checkpoint: type a question.")  # the progress bar
        terminal.expect(">")
        terminal.send(TEXT["question"] + "\n")
        terminal.expect("answering")  # the first answer compiles: the screen says so
        terminal.expect(TEXT["response"][1:5])
        terminal.send("\x03")
        rest = terminal.expect("(stopped; this answer is not part of the conversation)")
        assert TEXT["response"][-5:] not in rest
        terminal.expect(">")
        terminal.send("\x03")
        terminal.expect("(Ctrl-D or /quit leaves)")
        terminal.expect(">")
        terminal.send(f"/image {IMAGE}\n")
        terminal.expect("[1 image] >")
        terminal.send("/he\t")  # completed
        terminal.expect("/help")
        terminal.send("\n")
        terminal.expect("Alt-Enter begins a new line")
        terminal.expect(">")
        terminal.send("\x1b[200~/no\nsecond line\x1b[201~")  # pasted: the line break does not send it
        terminal.expect("second line")
        terminal.send("\n")
        terminal.expect("there is no command /no")
        terminal.expect(">")
        terminal.send("\x04")
        assert terminal.leave() == 0
        assert "Traceback" not in terminal.seen


def test_interrupted_while_loading(cache):
    code = "from internvl_jax.inference import loading\nimport time\nloading.read_params = lambda *_: time.sleep(60)"
    with Terminal(cache, *GOLDEN, "Hi", code=code) as terminal:
        terminal.expect("starting")
        time.sleep(3)
        terminal.send("\x03")
        terminal.expect("interrupted")
        assert terminal.leave() == 130


def test_pipes(cache, converted):
    """stdout holds the answer alone, stderr nothing that only a terminal should see."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with process(cache, *converted, "--image", IMAGE, QUESTION, **options) as running:
        out, err = running.communicate()
    assert running.returncode == 0
    assert out.decode() == SEEN["response"] + "\n"
    assert err.decode() == "(cut off after 32 tokens: --max-new-tokens allows more)\n"


def test_a_reader_that_leaves(cache, converted):
    for option in ((), ("--json",)):
        with process(
            cache, *converted, *option, TEXT["question"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as running:
            running.stdout.close()
            err = running.stderr.read().decode()
        assert running.returncode == 0
        assert err == "" if option else "Broken" not in err


def test_a_terminal_that_knows_no_chinese(cache, converted):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    code = "sys.stdout.reconfigure(encoding='ascii'); sys.stderr.reconfigure(encoding='ascii')"
    with process(cache, *converted, TEXT["question"], code=code, **options) as running:
        out, err = running.communicate()
    assert running.returncode == 0
    assert out.decode("ascii") == "".join(c if c.isascii() else "?" for c in TEXT["response"]) + "\n"
    assert b"Traceback" not in err
