"""The command line: what it prints where, exit codes, sessions, interrupts. Mostly in this process, some in others."""

import argparse
import io
import json
import logging
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.golden import DATA, bundle

import internvl_jax
from internvl_jax import checkpoint
from internvl_jax.cli import main, options, runner, session
from internvl_jax.inference import loading
from internvl_jax.utils.progress import printable

BUNDLE, LLAVA = DATA / "internvl_chat_v1_1", DATA / "llava_1_5"
CHECKPOINT = BUNDLE / "checkpoint"
_, FACTS = bundle("internvl_chat_v1_1")
PROMPTS = {prompt["id"]: prompt for prompt in FACTS["prompts"]}
TEXT, SEEN = PROMPTS["text_only"], PROMPTS["en_single"]  # RGB: the same pixels on the reference's two paths
IMAGE = str(BUNDLE / FACTS["images"]["rgb"]["file"])
QUESTION = SEEN["question"].removeprefix("<image>\n")
GOLDEN = ("chat", "--checkpoint", str(CHECKPOINT), "--max-new-tokens", "32")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Programs compiled in one process are read in the next."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main.main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def chat():
    pytest.importorskip("torch")  # the golden checkpoint is PyTorch's
    return internvl_jax.load(CHECKPOINT)


@pytest.fixture
def golden(run, chat, monkeypatch):
    """Run `chat` with the golden model, read once for all. What `load` was given is in `golden.loaded`."""

    def golden(*argv, **options):
        return run(*GOLDEN, *argv, **options)

    def load(path, **options):
        golden.loaded = (path, options)
        return chat

    monkeypatch.setattr("internvl_jax.inference.loading.load", load)
    return golden


def process(cache, *argv, code=None, **options):
    """Start `internvl-jax ARGV` in a process of its own; `code` runs first."""
    start = f"import sys\n{code or ''}\nfrom internvl_jax.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)}
    environment.update(TERM="xterm", COLUMNS="100", PROMPT_TOOLKIT_NO_CPR="1")
    return subprocess.Popen([sys.executable, "-c", start, *argv], env=environment, **options)


# Help.


def commands():
    """The parser of every command, by its name."""
    return main.build_parser()._subparsers._group_actions[0].choices


@pytest.mark.parametrize("argv", [(), ("--help",)], ids=str)
def test_help_names_every_command(run, argv, capsys):
    if argv:
        with pytest.raises(SystemExit, match="0"):
            run(*argv)
        out, err = capsys.readouterr()
    else:
        code, out, err = run()
        assert code == 0
    assert err == ""
    assert {"chat", "convert", "export", "parity"} <= set(commands())
    for command in commands():
        assert re.search(rf"\n    {command}\s", out)
    assert "'internvl-jax COMMAND --help' explains each command" in out


@pytest.mark.parametrize("command", commands())
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main.main([command, "--help"])
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: internvl-jax {command} ")
    assert err == ""
    parser = commands()[command]
    assert len(parser.description) > 80
    assert [action.dest for action in parser._actions if not action.help] == []


def every_action(parser):
    """Every option and argument of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from every_action(one)
        else:
            yield action


def every_parser(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from every_parser(one)


def test_every_option_shows_its_default():
    missing = []
    for parser in every_parser(main.build_parser()):
        shown = " ".join(parser.format_help().split())
        assert "%" not in shown.replace("100%", "")
        for action in parser._actions:
            if action.option_strings and not action.required and action.nargs != 0:
                text = parser._get_formatter()._expand_help(action)
                if "(default" not in text:
                    missing.append((parser.prog, action.dest))
    assert missing == []


def test_the_same_thing_has_the_same_option():
    """An option has the same type wherever it is, but for what differs on purpose."""
    found = {}
    for action in every_action(main.build_parser()):
        for flag in action.option_strings:
            found.setdefault(flag, set()).add((getattr(action.type, "__name__", None), str(action.choices)))
    differing = {flag for flag, kinds in found.items() if len(kinds) > 1}
    # Training and evaluation check numbers of the recipe and of the published settings themselves.
    # `parity` takes one image; the trace of `train` is part of its output.
    assert differing <= {"--max-new-tokens", "--num-beams", "--max-seq-length", "--remat", "--image", "--profile"}
    assert found.keys() & {"--out", "--batch", "--rows", "--length", "--base", "--wait", "--accumulate"} == set()


def test_generation_settings_are_complete_and_their_defaults_true():
    from internvl_jax.inference.sampling import GenerationConfig

    defaults = {name: field.default for name, field in GenerationConfig.__dataclass_fields__.items()}
    shown = {one.name: one.default for one in options.GENERATION}
    assert set(defaults) == {*shown, "stop", "eos_token_ids"}
    for name, default in shown.items():
        assert default.startswith(str(defaults[name]))
        assert one_value(default) == defaults[name] or name == "max_new_tokens"


def one_value(text):
    return {"False": False}.get(text, text) if not text[0].isdigit() else float(text.partition(",")[0])


def test_help_of_a_recipe_shows_its_numbers(capsys):
    for recipe, numbers in (("stage2", "global batch 128"), ("lora", "rank 16"), (None, "the recipe's")):
        with pytest.raises(SystemExit, match="0"):
            main.main(["train", *([recipe] if recipe else []), "--help"])
        out = " ".join(capsys.readouterr().out.split())
        expected = {
            "stage2": "rows per optimizer step, over all devices (default: 128)",
            "lora": "rank; sets alpha to twice as much (default: 16)",
            None: "peak learning rate (default: the recipe's)",
        }[recipe]
        assert expected in out, numbers


def test_every_path_is_resolved_where_it_enters():
    actions = list(every_action(main.build_parser()))
    assert not [action.dest for action in actions if action.type is Path]
    assert len([action for action in actions if action.type is options.path]) > 40


def test_help_needs_no_jax():
    """--help answers at once: the slow imports come later."""
    code = (
        "import sys; from internvl_jax.cli import main; main.build_parser()\n"
        "print('jax' in sys.modules, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("chatt",), "invalid choice: 'chatt'"),
        (("chat", "--colour", "red"), "unrecognized arguments: --colour"),
        (("chat", "--max-new-tokens", "many", "Hi"), "--max-new-tokens: invalid int value: 'many'"),
        (("chat", "--dtype", "float16", "Hi"), "--dtype: invalid choice: 'float16'"),
        (("chat", "--initialization-timeout", "-1", "Hi"), "must be a number of seconds, at least 0, not -1"),
        (("chat", "--initialization-timeout", "nan", "Hi"), "must be a number of seconds, at least 0, not nan"),
        (("chat", "--process-id", "-1", "Hi"), "--process-id: must be at least 0"),
        (("chat", "--num-processes", "0", "Hi"), "--num-processes: must be at least 1"),
        (("bench", "--batch-size", "0"), "--batch-size: must be at least 1 and below 2**31, not 0"),
        (("compile-report", "--batch-size", "two"), "--batch-size: 'two' is not a whole number"),
        (("data", "check", "meta.json", "--limit", "0"), "--limit: must be at least 1"),
        (("chat", "--image", "https://example.com/a.png", "Hi"), "is a URL; nothing is downloaded"),
        (("eval", "pope", "--data", "d", "--num-beams", "0"), "--num-beams: must be at least 1"),
        (("eval", "pope", "--data", "d", "--max-new-tokens", "0"), "--max-new-tokens: must be at least 1"),
        (("eval", "pope", "--data", "d", "--limit", "0"), "--limit: must be at least 1"),
        (("convert", "gs://bucket/model", "here"), "is a URL; nothing is downloaded"),
        (("chat", "--checkpoint", "~nobody-has-this-name/x", "Hi"), "is not a path"),
        (("convert", "somewhere"), "the following arguments are required: DST"),
        (("batch", "q.jsonl", "--out", "a.jsonl"), "the following arguments are required: --output"),
        (("eval", "pope", "--data", "d", "--batch", "2"), "unrecognized arguments: --batch 2"),
        (("chat", "--early-stopping", "maybe", "Hi"), "--early-stopping: must be true, false or never, not 'maybe'"),
        (("chat", ""), "the prompt is empty: ask a question, or leave PROMPT out to start a session"),
        (("chat", "--json"), "--json prints one answer: give it a PROMPT"),
        (("chat", IMAGE, "Hi"), f"{IMAGE} is an image, not a question: write --image {IMAGE}"),
        (("chat", "none.png"), "none.png is an image, not a question"),
        (("chat", "What", "is", "this?"), "one PROMPT is expected, not 3 ('What', 'is', 'this?'): quote it"),
        (("chat", "--image", "a.png", "Is it", "red?"), "one PROMPT is expected, not 2 ('Is it', 'red?'): quote it"),
        (("train", "lora", "--data=d", "--output=o", "--workers=-1"), "--workers: must be at least 0"),
        (("train", "lora", "--data=d", "--output=o", "--log-every=0"), "--log-every: must be at least 1"),
        (("convert", "a", "b", "--force-int4-vision"), "--force-int4-vision goes with --quantize int4"),
    ],
    ids=str,
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main.main(list(argv))
    out, err = capsys.readouterr()
    assert out == ""
    error, usage = err.splitlines()  # one line, and the command's own usage
    assert error.startswith("error: ")
    assert message in error
    assert usage.startswith("usage: internvl-jax ")
    if argv[0] != "chatt":
        assert usage.startswith(f"usage: internvl-jax {argv[0]} ")


@pytest.mark.parametrize("argv", [["-m", "internvl_jax"], ["-m", "internvl_jax.cli.main"]])
def test_version(argv):
    result = subprocess.run([sys.executable, *argv, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"internvl-jax {internvl_jax.__version__}\n"
    assert {"__version__", "load", "Chat"} <= set(dir(internvl_jax))


# One question.


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="this system names no open files")
@pytest.mark.parametrize("session", [False, True])
def test_an_image_from_a_pipe(golden, session):
    read_end, write_end = os.pipe()
    with open(write_end, "wb") as file:
        file.write(Path(IMAGE).read_bytes())
    try:
        name = f"/dev/fd/{read_end}"  # what --image <(cat image.png) passes
        if session:
            code, out, _ = golden(stdin=f"/image {name}\n{QUESTION}\n/quit\n")
        else:
            code, out, _ = golden("--image", name, QUESTION)
    finally:
        os.close(read_end)
    assert (code, out) == (0, SEEN["response"] + "\n")


def test_an_answer_and_nothing_else(golden):
    code, out, err = golden("--image", IMAGE, QUESTION)
    assert code == 0
    assert out == SEEN["response"] + "\n"
    assert err == "(cut off after 32 tokens: --max-new-tokens allows more)\n"


def test_a_question_from_standard_input(golden):
    code, out, _ = golden("-", stdin=TEXT["question"] + "\n")
    assert (code, out) == (0, TEXT["response"] + "\n")


def test_an_answer_that_ends_by_itself_says_nothing_more(golden):
    assert golden("--stop", TEXT["response"][9:12], TEXT["question"]) == (0, TEXT["response"][:9].strip() + "\n", "")


@pytest.mark.parametrize("question", ["请详细描述这张图片。", "What is 😀 in this café?"])
def test_json(golden, question):
    code, out, err = golden("--json", "--image", IMAGE, IMAGE, question)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    reply = json.loads(out)
    assert set(reply) == {"answer", "tokens", "finish_reason", "history", "prompt_tokens", "timings"}
    assert set(reply["timings"]) == {"encode", "prefill", "decode", "total"}
    assert all(seconds > 0 for seconds in reply["timings"].values())
    assert len(reply["tokens"]) == 32
    assert reply["finish_reason"] == "length"
    assert reply["history"] == [[f"<image>\n{question}", reply["answer"]]]
    assert question in out  # readable, not escaped


def test_json_is_what_is_printed(golden):
    code, out, _ = golden("--json", TEXT["question"])
    reply = json.loads(out)
    assert code == 0
    assert (reply["answer"], reply["tokens"]) == (TEXT["response"], TEXT["generated_ids"])


def test_json_on_a_terminal_that_knows_no_chinese(golden, monkeypatch):
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    question = "请详细描述这张图片。"
    assert golden("--json", question)[0] == 0
    plain.flush()
    assert json.loads(plain.buffer.getvalue())["history"][0][0] == question


def test_settings_without_effect_are_named(golden):
    _, _, err = golden("--top-p", 0.5, "--seed", 3, TEXT["question"])
    assert "--top-p, --seed: ignored at temperature 0" in err
    assert golden("--top-p", 0.5, "--seed", 3, "--temperature", 1, TEXT["question"])[2].count("ignored") == 0


def test_settings_arrive(golden):
    search = FACTS["beam_search"][0]
    assert golden("--num-beams", 5, "--image", IMAGE, QUESTION)[:2] == (0, search["response"] + "\n")
    warm = [golden("--temperature", 1.5, "--seed", seed, TEXT["question"])[1] for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    for option in (("--top-k", 1), ("--top-p", 1e-6)):
        assert golden("--temperature", 1.5, *option, TEXT["question"])[1] == TEXT["response"] + "\n"
    for option in (("--repetition-penalty", 5), ("--system", "Answer in Chinese.")):
        code, out, _ = golden(*option, TEXT["question"])
        assert code == 0
        assert out not in ("\n", TEXT["response"] + "\n")
    turned = BUNDLE / FACTS["images"]["exif_rot"]["file"]
    assert golden("--image", turned, QUESTION)[1] != golden("--image", turned, "--ignore-exif", QUESTION)[1]


def test_the_model_is_loaded_as_asked(golden):
    golden(TEXT["question"])
    path, options = golden.loaded
    assert path == CHECKPOINT
    assert (options["mesh"], options["dtype"]) == (None, None)
    golden("--mesh", "data=2,tensor=4", "--dtype", "bfloat16", TEXT["question"])
    _, options = golden.loaded
    assert (options["mesh"], options["dtype"]) == ("data=2,tensor=4", "bfloat16")


def test_an_image_of_one_pixel(golden, tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    code, out, _ = golden("--image", tmp_path / "dot.png", QUESTION)
    assert code == 0
    assert out.strip()


def test_an_image_through_a_pipe(golden, tmp_path):
    """It can be read once only."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for content, expected in (
        ((BUNDLE / FACTS["images"]["rgb"]["file"]).read_bytes(), (0, SEEN["response"] + "\n")),
        (b"", (2, "")),
    ):
        writer = threading.Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        code, out, err = golden("--image", pipe, QUESTION)
        writer.join()
        assert (code, out) == expected
    assert "is empty" in err


@pytest.mark.parametrize("name", ["..", "sp ace", "uni中", "new\nline", "~", "x" * 250, "link", "slash/"])
def test_names_of_checkpoints_and_images(run, tmp_path, monkeypatch, name):
    """Every kind of name, relative ones too, reaches the parameters and the image."""
    real = tmp_path / "home" / (name.rstrip("/") if name not in ("..", "~", "link") else "model")
    shutil.copytree(loading.NANO, real)
    shutil.copy(IMAGE, real / "im age.png")
    (tmp_path / "link").symlink_to(real)
    (real / "inner").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(real / "inner")
    where = {"..": "..", "~": "~/model", "link": "../../../link/../model"}.get(name, f"../../{name}")
    code, out, _ = run("chat", "--checkpoint", where, "--image", f"{where}/im age.png", "--max-new-tokens", 1, "Hi")
    assert code == 0
    assert out.strip()


def test_llava_with_its_tower_beside_it(run):
    pytest.importorskip("torch")
    facts = bundle("llava_1_5")[1]
    prompt = next(prompt for prompt in facts["orig_prompts"] if prompt["id"] == "en_single")
    options = ("--checkpoint", LLAVA / "original", "--image", LLAVA / "images" / "rgb.png", "--max-new-tokens", 32)
    code, out, _ = run("chat", *options, prompt["messages"][0].removeprefix("<image>\n"))
    assert (code, out) == (0, prompt["response"].strip() + "\n")


# Errors.


def test_errors_say_what_to_do(run, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes((BUNDLE / FACTS["images"]["rgb"]["file"]).read_bytes()[:2000])
    text = tmp_path / "text[bold].txt"
    text.write_text("no image")
    empty = tmp_path / "empty"
    empty.mkdir()
    lonely = tmp_path / "llava"
    shutil.copytree(LLAVA / "original", lonely)
    for argv, message in (
        ((*GOLDEN, "--image", "nowhere.png", "Hi"), "nowhere.png does not exist"),
        ((*GOLDEN, "--image", truncated, "Hi"), f"{truncated} is damaged or truncated"),
        ((*GOLDEN, "--image", text, "Hi"), f"{text} is not an image in a format that can be read"),
        ((*GOLDEN, "--image", tmp_path, "Hi"), "is a directory, not an image"),
        ((*GOLDEN, "--image", IMAGE, "none.png"), "none.png does not exist"),
        ((*GOLDEN, "--num-beams", 0, "Hi"), "num_beams must be at least 1"),
        ((*GOLDEN, "--top-k", -1, "Hi"), "top_k must be at least 0"),
        ((*GOLDEN, "--top-p", 0, "Hi"), "top_p must lie in (0, 1]"),
        ((*GOLDEN, "--temperature", "nan", "Hi"), "temperature must be a number, not nan"),
        ((*GOLDEN, "--max-new-tokens", 0, "Hi"), "max_new_tokens must be at least 1"),
        ((*GOLDEN, "--repetition-penalty", 0, "Hi"), "repetition_penalty must be above 0"),
        ((*GOLDEN, "--seed", -1, "Hi"), "seed must be at least 0"),
        ((*GOLDEN, "--seed", 2**32, "Hi"), "seed must be at least 0 and below 2**31"),
        ((*GOLDEN, "--stop", "", "Hi"), "stop must be strings that are not empty"),
        ((*GOLDEN, "bytes\udcff"), "the text is not valid UTF-8"),
        ((*GOLDEN, "--temperature", "-1", "Hi"), "temperature must be 0 (greedy) or more, not -1.0"),
        ((*GOLDEN, "--num-beams", 2, "--temperature", 1, "Hi"), "beam search does not sample"),
        ((*GOLDEN, "--mesh", "tensor:4", "Hi"), 'write for example "data=2,tensor=8"'),
        ((*GOLDEN, "--mesh", "tensor=4096", "Hi"), "needs 4096 devices"),
        ((*GOLDEN, "Look: <image>"), "no images are given"),
        (("chat", "--checkpoint", tmp_path / "nowhere", "Hi"), "nowhere does not exist: pass a directory"),
        (("chat", "--checkpoint", text, "Hi"), "is a file: pass the directory that holds config.json"),
        (("chat", "--checkpoint", empty, "Hi"), "config.json does not exist"),
        (
            ("chat", "--checkpoint", lonely, "Hi"),
            "which is published separately: put its directory (config.json",
        ),
        (("chat", "--checkpoint", DATA / "intern_vit" / "checkpoint_bin", "Hi"), "can only `encode`"),
        (("chat", "--checkpoint", DATA / "intern_vit" / "checkpoint_bin"), "can only `encode`"),  # not asked first
    ):
        monkeypatch.setattr(session.Session, "run", lambda _: pytest.fail("a session has started"))
        code, out, err = run(*argv)
        assert code == 2, argv
        assert out == ""
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1  # in one line, whatever the terminal's width


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "torch; pip install 'internvl-jax[convert]'"),
        (ImportError("no torch: pip install 'internvl-jax[convert]'"), 2, "pip install 'internvl-jax[convert]'"),
        (PermissionError(13, "Permission denied", "out"), 2, "Permission denied: 'out'"),
        (MemoryError(), 2, "too little memory (out of memory); try --dtype bfloat16"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GB\nmore"), 2, "too little memory (RESOURCE_EXHAUSTED: 9 GB); try"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failures_of_the_machine(run, monkeypatch, raised, code, message):
    monkeypatch.setattr("internvl_jax.inference.loading.load", lambda *_, **__: (_ for _ in ()).throw(raised))
    got, out, err = run("chat", "Hi")
    assert (got, out) == (code, "")
    assert message in err


def test_our_own_mistakes_keep_their_traceback(run, monkeypatch):
    monkeypatch.setattr("internvl_jax.inference.loading.load", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("chat", "Hi")


def test_warnings_are_one_line(run, monkeypatch):
    def load(*_, **__):
        logging.getLogger("internvl_jax.config.hf").warning("config.json: ignored fields: answer_style")
        warnings.warn("of a library", UserWarning, stacklevel=1)
        raise ValueError("enough")

    monkeypatch.setattr("internvl_jax.inference.loading.load", load)
    _, _, err = run("chat", "Hi")
    assert err == "warning: config.json: ignored fields: answer_style\nwarning: of a library\nerror: enough\n"


def test_an_answer_that_is_not_finite(golden, chat, monkeypatch):
    """Exit 1, a failed check, however the answer was wanted; a session goes on."""
    read = chat.generator.read

    def spoiled(state):
        rows, reasons, running = read(state)
        return rows, ["error"] * len(reasons), running & False

    monkeypatch.setattr(chat.generator, "read", spoiled)
    for argv in ((), ("--json",), ("--temperature", "1"), ("--stop", "x")):
        code, out, err = golden(*argv, "Hello")
        assert (code, out) == (1, "")
        assert err.startswith("error: the model's logits are not finite (NaN or Inf): its weights are damaged")
    code, out, err = golden(stdin="Hello\nHello\n")
    assert err.count("error: the model's logits are not finite") == 2


# Sessions.


def test_a_session(golden, chat):
    turns = PROMPTS["en_multi_turn"]["history"][0][0].removeprefix("<image>\n"), "And then?"
    lines = [
        "",
        "/help",
        "/fly",
        "/image",
        "/image nowhere.png",
        f"/image '{IMAGE}'",
        *turns,
        "<image>",
        f"/image {IMAGE}",
        QUESTION,
        "/clear",
        TEXT["question"],
        "/quit",
        "not asked",
    ]
    code, out, err = golden(stdin="\n".join(lines))
    assert code == 0
    answers = out.removesuffix("\n")
    assert answers.endswith(TEXT["response"])  # after /clear
    assert err.count("/image FILE") == 2  # for /help and for /fly
    assert "there is no command /fly; a question may begin with //" in err
    assert "error: /image needs a file: /image photo.jpg" in err
    assert "error: nowhere.png does not exist" in err
    assert "error: the text has 2 <image> placeholders for 1 image(s)" in err

    # The questions before it were one conversation, in which the second image came with the third question.
    first = golden("--json", "--image", IMAGE, turns[0])[1]
    second = chat.chat(turns[1], IMAGE, json.loads(first)["history"], max_new_tokens=32)
    third = chat.chat(QUESTION, [IMAGE] * 2, second.history, max_new_tokens=32)
    assert third.history[2][0].startswith("<image>")
    said = (json.loads(first)["answer"], second.text, third.text, TEXT["response"])
    assert answers == "\n".join(said)


def test_a_script_that_got_no_answer_fails(golden):
    assert golden(stdin="<image> what?\n/image nowhere.png\n")[:2] == (1, "")
    assert golden(stdin="bytes \udcff\n/quit\n")[:2] == (1, "")
    assert golden(stdin="\n/help\n")[0] == 0


def test_sigterm_ends_a_session_not_an_answer(golden, monkeypatch):
    def answer(*_):
        raise runner.Terminated(signal.SIGTERM)

    monkeypatch.setattr(session, "print_answer", answer)
    assert golden(stdin="Hi\nHi again\n") == (143, "", "ended by SIGTERM\n")


def test_a_session_with_beams_and_images_from_the_start(golden):
    search = FACTS["beam_search"][0]
    code, out, err = golden("--image", IMAGE, "--num-beams", 5, stdin=QUESTION + "\n")
    assert (code, out) == (0, search["response"] + "\n")
    assert "error" not in err


def test_a_question_that_begins_with_a_slash(golden, chat):
    code, out, err = golden(stdin="//image is a command?\n")
    assert code == 0
    assert out == chat.chat("/image is a command?", max_new_tokens=32).text + "\n"
    assert "no command" not in err


def test_a_full_context_hints_at_clear(golden):
    code, _, err = golden(stdin=f"{TEXT['question']}\n{'very long ' * 400}\n")
    assert code == 0
    assert "/clear begins a new conversation" in err


def test_images_before_and_after_the_question(golden, chat, capsys):
    expected = chat.chat(QUESTION, [IMAGE] * 2, max_new_tokens=32).text + "\n"
    for argv in (
        ("--image", IMAGE, IMAGE, QUESTION),
        (QUESTION, "--image", IMAGE, IMAGE),
        ("--image", IMAGE, "--image", IMAGE, QUESTION),
        ("--image", IMAGE, QUESTION, "--image", IMAGE),
    ):
        assert golden(*argv)[:2] == (0, expected), argv


def test_control_characters_of_an_answer_are_escaped(golden, chat, monkeypatch):
    raw = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
    assert raw.search(SEEN["response"])  # this one has such a character
    code, out, _ = golden("--json", "--image", IMAGE, QUESTION)
    assert (code, json.loads(out)["answer"]) == (0, SEEN["response"])
    assert not raw.search(out)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    for more in ((), ("--num-beams", "2")):
        _, out, _ = golden(*more, "--image", IMAGE, QUESTION)
        assert not raw.search(out)
        assert more or printable(SEEN["response"]) + "\n" == out
    text = "a\x1b]0;title\x07\x9b31mred\tb\nc\x7f"
    assert printable(text) == "a\\x1b]0;title\\x07\\x9b31mred\tb\nc\\x7f"


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
from internvl_jax.inference import chat, generator
chat.STREAM_CHUNK = 1
decode = generator.Generator.decode
generator.Generator.decode = lambda *args: time.sleep(0.25) or decode(*args)
"""


def test_a_session_in_a_terminal(cache):
    """Ctrl-C stops the answer and not the program, and an empty line's Ctrl-C only says how to leave."""
    pytest.importorskip("torch")
    with Terminal(cache, *GOLDEN, code=SLOW) as terminal:
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
        terminal.expect("[1 image(s)] >")
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
    code = "from internvl_jax.inference import loading\nimport time\nloading._read = lambda *_: time.sleep(60)"
    with Terminal(cache, *GOLDEN, "Hi", code=code) as terminal:
        terminal.expect("starting")
        time.sleep(3)
        terminal.send("\x03")
        terminal.expect("interrupted")
        assert terminal.leave() == 130


# Other processes.


def test_pipes(cache):
    """stdout holds the answer alone, stderr nothing that only a terminal should see."""
    pytest.importorskip("torch")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with process(cache, *GOLDEN, "--image", IMAGE, QUESTION, **options) as running:
        out, err = running.communicate()
    assert running.returncode == 0
    assert out.decode() == SEEN["response"] + "\n"
    assert err.decode() == "(cut off after 32 tokens: --max-new-tokens allows more)\n"


def test_a_reader_that_leaves(cache):
    pytest.importorskip("torch")
    for option in ((), ("--json",)):
        with process(
            cache, *GOLDEN, *option, TEXT["question"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as running:
            running.stdout.close()
            err = running.stderr.read().decode()
        assert running.returncode == 0
        assert err == "" if option else "Broken" not in err


def test_a_terminal_that_knows_no_chinese(cache):
    pytest.importorskip("torch")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    code = "sys.stdout.reconfigure(encoding='ascii'); sys.stderr.reconfigure(encoding='ascii')"
    with process(cache, *GOLDEN, TEXT["question"], code=code, **options) as running:
        out, err = running.communicate()
    assert running.returncode == 0
    assert out.decode("ascii") == "".join(c if c.isascii() else "?" for c in TEXT["response"]) + "\n"
    assert b"Traceback" not in err


def test_verify(run, tmp_path):
    """What ships has no checksums; what is saved now has, and a flipped bit is found."""
    nano = Path(internvl_jax.__file__).parent / "nano" / "model"
    code, out, err = run("verify", str(nano))
    assert (code, out) == (0, "")
    assert "0.00 GB, sizes and numbers checked; it has no checksums" in " ".join(err.split())
    checkpoint.save(tmp_path / "new", {"mlp1": {"norm": {"scale": np.ones(4, np.float32)}}})
    code, out, err = run("verify", str(tmp_path / "new"))
    assert code == 0
    assert "sizes, checksums and numbers checked" in " ".join(err.split())
    (tmp_path / "new" / "params" / "mlp1.norm.scale" / "0").write_bytes(bytes(16))
    code, out, err = run("verify", str(tmp_path / "new"))
    assert code == 2
    assert "mlp1.norm.scale/0 is damaged" in "".join(err.split()).replace("isdamaged", " is damaged")
    code, out, err = run("verify", str(tmp_path))
    assert code == 2
    assert "convert a checkpoint" in " ".join(err.split())
