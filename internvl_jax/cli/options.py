"""What commands share on their command line: types that refuse bad values by name, and options. Imports no jax."""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from typing import Any

from internvl_jax.utils import files

logger = logging.getLogger(__name__)

# Settings of sampling.GenerationConfig that commands pass on; an option that is not given is None, its default.
GENERATION = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "num_beams",
    "seed",
    "stop",
)
SAMPLING = ("top_p", "top_k", "seed")  # without effect where nothing is sampled


# Types.


def path(text: str) -> Path:
    """A path as users write it, resolved where it enters: TensorStore and Orbax refuse `..`, and read no `~`."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL; nothing is fetched here: download it and pass its path")
    try:
        return files.resolve(text)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number from 0 on."""
    return _whole(text, 0)


def seconds(text: str) -> float:
    """A time from 0 on."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a number of seconds from 0 on, not {text}")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not least <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be at least {least} and below 2**31, not {text}")
    return value


# Groups.


def add_generation(parser: argparse.ArgumentParser) -> None:
    """How answers are generated: what `generation` reads, and what else belongs to a question."""
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest answer (1024, if the context has room)"
    )
    parser.add_argument("--temperature", type=float, metavar="X", help="0 (default) always takes the likeliest token")
    parser.add_argument("--top-p", type=float, metavar="X", help="sample from this much of the probability (1: all)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens (0: all)")
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 discourages repeats (1: off)")
    parser.add_argument("--num-beams", type=int, metavar="N", help="beam search with N beams (1: none)")
    parser.add_argument("--seed", type=int, metavar="N", help="makes samples repeatable (0)")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this text; repeatable")
    parser.add_argument("--system", metavar="TEXT", help="a system message, in front of the conversation")
    parser.add_argument("--ignore-exif", action="store_true", help="do not turn images upright (EXIF orientation)")


def generation(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given. Raises ValueError for values that make no sense; warns of idle ones."""
    from internvl_jax.inference.sampling import GenerationConfig

    given = {name: value for name in GENERATION if (value := getattr(args, name)) is not None}
    GenerationConfig(**given)
    idle = [f"--{name.replace('_', '-')}" for name in SAMPLING if name in given]
    if idle and not given.get("temperature"):
        logger.warning(
            "%s: without effect, because nothing is sampled at temperature 0; add --temperature 1 for example",
            ", ".join(idle),
        )
    return given


def add_template(parser: argparse.ArgumentParser) -> None:
    """In which template questions are asked, where the checkpoint does not say it rightly."""
    parser.add_argument(
        "--template", metavar="NAME", help="conversation template, internvl_zh or vicuna_v1 (default: the checkpoint's)"
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """In which precision weights and cache are held."""
    parser.add_argument("--quantize", choices=["int8", "int4"], help="weights of 8 bits, or 4 in the LLM's layers")
    parser.add_argument("--cache-dtype", choices=["int8"], help="keys and values of what was read in 8 bits")


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """The adapters of a checkpoint."""
    parser.add_argument("--adapters", type=path, metavar="DIR", help="low-rank adapters that training wrote")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """On a pod the same command starts on every host. Cloud TPU, GKE and Slurm say who is who; elsewhere the user."""
    group = parser.add_argument_group("several processes (Cloud TPU, GKE and Slurm are detected)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached")
    group.add_argument("--num-processes", type=count, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=natural, metavar="I", help="which one this is, from 0")
    group.add_argument(
        "--wait", type=seconds, default=300, metavar="S", help="seconds until missing ones are named (300)"
    )


def add_weights_and_processes(parser: argparse.ArgumentParser) -> None:
    """Both of the above, for commands that load a model on a pod."""
    add_weights(parser)
    add_processes(parser)
