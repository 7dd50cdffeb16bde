"""The parser of every command, argument types that reject bad values, and the options that commands share.

Imports no jax, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from internvl_jax.config.conversation_templates import TEMPLATES
from internvl_jax.inference.load_options import DTYPES, LoadOptions
from internvl_jax.utils import files

logger = logging.getLogger(__name__)

Commands = Any  # what ArgumentParser.add_subparsers returns; argparse has no public name for it


class HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs, keeps examples as written, and shows the default of every option."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(p if "\n" in p else textwrap.fill(p, width, initial_indent=indent) for p in paragraphs)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # names of choices stay whole

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        unset = action.default is None or action.default is False or action.default is argparse.SUPPRESS
        if not action.option_strings or action.required or unset or "(default" in text:
            return text
        shown = " ".join(map(str, action.default)) if isinstance(action.default, (list, tuple)) else action.default
        return f"{text} (default: {str(shown).replace('%', '%%') or 'none'})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with a short usage line, no abbreviated options, and errors of one line plus that usage."""

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", HelpFormatter)
        super().__init__(allow_abbrev=False, **options)
        self.set_defaults(parser=self)

    def format_usage(self) -> str:
        return f"usage: {self._short_usage()}\n"

    def format_help(self) -> str:
        self.usage = self._short_usage().replace("%", "%%")
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message.removeprefix('argument ')}\n{self.format_usage()}")

    def _short_usage(self) -> str:
        needed = [action for action in self._actions if action.required or not action.option_strings]
        formatter = self._get_formatter()
        formatter.add_usage(None, needed, [], prefix="")
        return " ".join(formatter.format_help().replace(self.prog, f"{self.prog} [options]", 1).split())


# Argument types.


def path(text: str) -> Path:
    """A path as users write it, resolved where it enters: TensorStore and Orbax reject `..` and do not expand `~`."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL; nothing is downloaded: fetch it and pass its path")
    try:
        return files.resolve(text)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def seconds(text: str) -> float:
    """A duration of at least 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, at least 0, not {text}")
    return value


def early_stopping(text: str) -> bool | str:
    """When beam search stops: transformers' values of `early_stopping`."""
    values: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}
    if text not in values:
        raise argparse.ArgumentTypeError(f"must be true, false or never, not {text!r}")
    return values[text]


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not least <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be at least {least} and below 2**31, not {text}")
    return value


# Shared options. Each is defined once.


def add_checkpoint(
    parser: Any, what: str = "converted checkpoint, or a published directory", default: str = "nano, the bundled model"
) -> None:
    """Add `--checkpoint`."""
    parser.add_argument("--checkpoint", type=path, metavar="DIR", help=f"{what} (default: {default})")


def add_output(parser: Any, what: str, *, required: bool = False, metavar: str = "DIR") -> None:
    """Add `--output`."""
    parser.add_argument("--output", type=path, required=required, metavar=metavar, help=what)


def add_mesh(parser: Any, default: str = "one device") -> None:
    """Add `--mesh`."""
    text = f"devices to shard over, for example tensor=8 or data=2,tensor=4 (default: {default})"
    parser.add_argument("--mesh", metavar="SPEC", help=text)


def add_vision_mode(parser: Any) -> None:
    """Add `--vision-mode`."""
    parser.add_argument(
        "--vision-mode",
        dest="vision",
        choices=["tensor", "data", "gather"],
        help="shard the vision tower's weights (tensor), its images (data), or its images and its weights, which are "
        "gathered layer by layer (gather) (default: tensor on a mesh with a tensor axis, else data)",
    )


def add_batch_size(parser: Any, what: str, default: int | None) -> None:
    """Add `--batch-size`. What a default of None means is part of `what`."""
    parser.add_argument("--batch-size", type=count, default=default, metavar="N", help=what)


def add_max_seq_length(parser: Any, what: str, default: int | None = None, **options: Any) -> None:
    """Add `--max-seq-length`. What a default of None means is part of `what`."""
    parser.add_argument("--max-seq-length", type=count, default=default, metavar="T", help=what, **options)


def add_dtype(parser: Any, default: str | None = None) -> None:
    """Add `--dtype`."""
    text = "compute dtype" + ("" if default else " (default: bfloat16; float32 on CPU)")
    parser.add_argument("--dtype", choices=DTYPES, default=default, help=text)


def add_quantization(parser: Any) -> None:
    """Add `--quantize` and `--cache-dtype`."""
    parser.add_argument(
        "--quantize",
        choices=["int8", "int4"],
        help="quantize the weights; int4 applies to the language model's layers (default: as stored)",
    )
    parser.add_argument("--cache-dtype", choices=["int8"], help="dtype of the KV cache (default: the compute dtype)")


def add_adapters(parser: Any) -> None:
    """Add `--adapters`."""
    parser.add_argument("--adapters", type=path, metavar="DIR", help="LoRA adapters written by train (default: none)")


def add_template(parser: Any) -> None:
    """Add `--template`."""
    text = f"conversation template: {', '.join(sorted(TEMPLATES))} (default: the checkpoint's)"
    parser.add_argument("--template", metavar="NAME", help=text)


def add_model(parser: Any, mesh_default: str = "one device") -> None:
    """Add the options that say which model is loaded, and how."""
    group = parser.add_argument_group("model")
    add_checkpoint(group)
    add_adapters(group)
    add_template(group)
    add_mesh(group, mesh_default)
    add_dtype(group)
    add_quantization(group)


def load_options(args: argparse.Namespace, images_per_call: int = 1) -> LoadOptions:
    """How the command line says that a checkpoint is loaded."""
    given = {field.name: getattr(args, field.name) for field in fields(LoadOptions) if hasattr(args, field.name)}
    return LoadOptions(**given, images_per_call=images_per_call)


@dataclass(frozen=True)
class Setting:
    """An option that sets a field of `sampling.GenerationConfig`."""

    name: str
    kind: Callable[[str], Any]
    metavar: str
    help: str
    default: str  # as shown

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


EARLY_STOPPING_HELP = (
    "when beam search stops: at num-beams finished answers (true), by transformers' heuristic (false), or when no "
    "better answer is possible (never)"
)
GENERATION = (
    Setting("max_new_tokens", int, "N", "longest answer", "1024, or what the context has room for"),
    Setting("min_new_tokens", int, "N", "shortest answer", "0"),
    Setting("temperature", float, "X", "sampling temperature; 0 is greedy", "0.0"),
    Setting("top_p", float, "X", "sample from the smallest set of tokens with this probability", "1.0"),
    Setting("top_k", int, "K", "sample from the K most probable tokens; 0 is all", "0"),
    Setting("repetition_penalty", float, "X", "above 1 discourages repetition", "1.0"),
    Setting("presence_penalty", float, "X", "subtracted from the logits of tokens that were generated before", "0.0"),
    Setting("frequency_penalty", float, "X", "subtracted as many times as a token was generated before", "0.0"),
    Setting("seed", int, "N", "seed of sampling", "0"),
    Setting("num_beams", int, "N", "beam search with N beams", "1"),
    Setting("length_penalty", float, "X", "rank beams by log-probability / length**X", "1.0"),
    Setting(
        "early_stopping",
        early_stopping,
        "{true,false,never}",
        EARLY_STOPPING_HELP,
        "False",
    ),
)


def add_generation(parser: Any) -> None:
    """Add every generation setting, and the options of a question."""
    group = parser.add_argument_group("generation")
    for one in GENERATION:
        text = f"{one.help} (default: {one.default.lower()})"
        group.add_argument(one.flag, type=one.kind, metavar=one.metavar, help=text)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="stop before this text; repeatable (default: none)"
    )
    group.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    group.add_argument(
        "--max-tiles",
        type=count,
        metavar="N",
        help="most tiles of an image's grid, for models that cut images into tiles (default: the checkpoint's)",
    )
    group.add_argument("--ignore-exif", action="store_true", help="do not apply the images' EXIF orientation")


def generation(args: argparse.Namespace) -> dict[str, Any]:
    """The generation settings that were given.

    Raises:
        ValueError: A value is out of range.
    """
    from internvl_jax.inference.generation.sampling import SAMPLING, GenerationConfig

    names = [*(one.name for one in GENERATION), "stop"]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    GenerationConfig(**given)
    ignored = [f"--{name.replace('_', '-')}" for name in SAMPLING if name in given]
    if ignored and not given.get("temperature"):
        logger.warning("%s: ignored at temperature 0; add --temperature 1 to sample", ", ".join(ignored))
    return given


def question_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_generation` read, as keyword arguments of `Chat.chat`."""
    options = generation(args)
    if args.system is not None:
        options["system"] = args.system
    if args.ignore_exif:
        options["honor_exif"] = False
    if args.max_tiles is not None:
        options["max_tiles"] = args.max_tiles
    return options


def add_json(parser: Any) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_vision_tower(parser: Any) -> None:
    """Add `--vision-tower`."""
    parser.add_argument(
        "--vision-tower",
        type=path,
        metavar="DIR",
        help="vision tower of LLaVA-1.5 and InternVL-Chat-V1-0 (default: inside the checkpoint or beside it, under the "
        "name in config.json)",
    )


def add_processes(parser: Any) -> None:
    """Add the options of a multi-host run, where the same command starts on every host."""
    group = parser.add_argument_group("multiple processes (detected on Cloud TPU, GKE and Slurm)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0 (default: detected)")
    group.add_argument("--num-processes", type=count, metavar="N", help="number of processes (default: detected)")
    group.add_argument("--process-id", type=natural, metavar="I", help="this process, from 0 (default: detected)")
    group.add_argument(
        "--initialization-timeout",
        type=seconds,
        default=300,
        metavar="S",
        help="seconds to wait for the other processes",
    )


def start_processes(args: argparse.Namespace) -> None:
    """Join the other processes, where there are any. Afterwards only process 0 prints to stdout."""
    from internvl_jax.parallel import distributed

    distributed.start(args.coordinator, args.num_processes, args.process_id, wait_seconds=args.initialization_timeout)
    if not distributed.is_process_0():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The arguments of these names that have a value."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}
