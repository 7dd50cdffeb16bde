"""The command line's help and options: complete, the same everywhere, bad ones refused in one line."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.cli_cases import IMAGE

import internvl_jax
from internvl_jax.cli import main, options


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
    from internvl_jax.inference.generation.sampling import GenerationConfig

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
            "lora": "rank of the adapters; sets alpha to twice the rank (default: 16)",
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
