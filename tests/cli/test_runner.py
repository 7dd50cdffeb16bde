"""cli/runner.py: what every command runs in. Signals, closed streams, missing devices and packages, each one line."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from internvl_jax.cli import runner
from internvl_jax.parallel import mesh as mesh_lib

START = "import sys, time\nfrom internvl_jax.cli import runner\n"


def python(code, *, shell="", **options):
    """Run code in a process of its own; `shell` redirects its streams. (exit code, stdout, stderr)."""
    command = ["sh", "-c", f'exec "$0" -c "$1" {shell}', sys.executable, START + code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_cleans_up(number, tmp_path):
    """As Ctrl-C does, and it is not taken for the Ctrl-C that only stops an answer."""
    code = f"""
def command():
    from internvl_jax.utils import files
    with files.replacing(files.resolve({str(tmp_path / "out")!r})) as temporary:
        temporary.write_text("half")
        print("begun", flush=True)
        time.sleep(60)
sys.exit(runner.run_command(command))
"""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", START + code], **options) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == f"ended by {number.name}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_second_termination_lets_the_first_clean_up(tmp_path):
    code = f"""
import os, signal
def command():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        open({str(tmp_path / "cleaned")!r}, "w").close()
sys.exit(runner.run_command(command))
"""
    assert python(code)[0] == 143
    assert (tmp_path / "cleaned").exists()


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert runner.run_command(lambda: 0) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_nohup_goes_on():
    code = "import os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    code += "sys.exit(runner.run_command(lambda: os.kill(os.getpid(), signal.SIGHUP) or 7))"
    assert python(code)[0] == 7


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("shell", [">&-", ">/dev/full"])
def test_stdout_that_cannot_be_written(shell, unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    reason = "Bad file descriptor" if shell == ">&-" else "No space left on device"
    code = "sys.exit(runner.run_command(lambda: print('answer') or 0))"
    assert python(code, shell=shell, env=environment)[::2] == (
        2,
        f"error: standard output cannot be written ({reason})\n",
    )
    code = "from internvl_jax.cli import main as cli\nsys.exit(cli.main(['--help']))"
    assert python(code, shell=shell, env=environment)[::2] == (
        2,
        f"error: standard output cannot be written ({reason})\n",
    )


def test_closed_streams():
    code = "from internvl_jax.cli import main as cli\nsys.exit(cli.main(['chat', '-']))"
    said = "error: standard input cannot be read (Bad file descriptor): give the question as PROMPT\n"
    assert python(code, shell="<&-") == (2, "", said)
    assert python("sys.exit(runner.run_command(lambda: 1 / 1 and runner.print_error('x')))", shell="2>&-") == (
        2,
        "",
        "",
    )
    # The number of a closed stream goes to no file that is opened later.
    code = "import os\nrunner.run_command(lambda: print(os.open('/dev/null', os.O_RDONLY) > 2, file=sys.stderr) or 0)"
    assert python(code, shell="<&- >&-")[2] == "True\n"


@pytest.mark.parametrize("platform", ["cuda", "foo"])
def test_devices_that_are_not_there(platform):
    code = "def command():\n    import jax\n    return len(jax.devices())\nsys.exit(runner.run_command(command))"
    status, out, err = python(code, env={**os.environ, "JAX_PLATFORMS": platform})
    assert (status, out) == (2, "")
    assert err.startswith(f"error: JAX_PLATFORMS={platform} cannot be used here (")
    assert "JAX_PLATFORMS=cpu computes without it" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "hint"),
    [
        ("torch", "; pip install 'internvl-jax[convert]'"),
        ("safetensors.numpy", "; pip install 'internvl-jax[convert]'"),
        ("grain", "; pip install 'internvl-jax[train]'"),
        ("sklearn.metrics", "; pip install 'internvl-jax[train]'"),
        ("tensorboardX", "; pip install 'internvl-jax[train]'"),
        ("openpyxl", "; pip install 'internvl-jax[eval]'"),
        ("pyarrow.parquet", "; pip install 'internvl-jax[eval]'"),
        ("libtpu", "; pip install 'internvl-jax[tpu]'"),
        ("peft", "; pip install 'internvl-jax[test]'"),
        ("jax", "; pip install internvl-jax"),
        ("ml_dtypes", "; pip install internvl-jax"),
        ("PIL.Image", "; pip install internvl-jax"),
        ("something_else", ""),
        (None, ""),
    ],
)
def test_missing_packages_name_their_extra(module, hint):
    assert runner.install_hint(module) == hint


def test_a_missing_package_is_one_line(capsys):
    def command():
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")

    assert runner.run_command(command) == 2
    said = "error: this command needs a package that is not installed: sklearn; pip install 'internvl-jax[train]'\n"
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tensor=7", "tensor=7 does not divide"),
        ("fsdp=3", "fsdp=3 does not divide"),
        ("data=7", "the first 7 form no block"),
        ("data=9", "needs 9 devices"),
        ("tensor=0", "sizes are positive"),
        ("data=-1,fsdp=-1", "sizes are positive"),
    ],
)
def test_meshes_of_a_slice(spec, words):
    pytest.importorskip("libtpu")
    from internvl_jax.aot.topology import parse_topology
    from internvl_jax.config import PRESETS

    with pytest.raises(mesh_lib.MeshError, match=words):
        mesh_lib.make_mesh(spec, parse_topology("v5e-8").devices(), PRESETS["internvl_chat_v1_1"]())


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM")])
def test_background_work_ends_at_once(number, said):
    """A compilation holds its thread and does not notice signals."""
    code = """
import os, signal
from internvl_jax.utils.progress import in_background
def work():
    print("begun", flush=True)
    time.sleep(60)
    return 0
sys.exit(runner.run_command(lambda: in_background(work, "compiling")))
"""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", START + code], **options) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (128 + number, f"{said}\n")


def test_termination_at_the_prompt_of_a_terminal():
    """prompt_toolkit has an event loop of its own, which must not swallow the signal."""
    code = """
from internvl_jax.cli.terminal import Prompt
prompt = Prompt({})
sys.exit(runner.run_command(lambda: len(prompt("> "))))
"""
    controller, terminal = os.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    with subprocess.Popen([sys.executable, "-c", START + code], **streams) as process:
        os.close(terminal)
        shown = b""
        while b">" not in shown:
            shown += os.read(controller, 1024)
        process.send_signal(signal.SIGTERM)
        with suppress(OSError):  # the end of the terminal, after its last process
            while piece := os.read(controller, 1024):
                shown += piece
    os.close(controller)
    assert process.returncode == 143
    assert b"ended by SIGTERM" in shown
