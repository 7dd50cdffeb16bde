"""The `adapters` commands: merge LoRA adapters, and exchange them with peft."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl_jax.cli import options
from internvl_jax.utils import files
from internvl_jax.utils.progress import counting, err


def add_parser(commands: options.Commands) -> None:
    """Add `adapters` to the commands."""
    adapters = commands.add_parser(
        "adapters",
        help="merge LoRA adapters, or exchange them with Hugging Face's peft",
        description="The recipes lora and lora-both write adapters. `chat --adapters DIR` applies them unmerged to the "
        "checkpoint that they were trained on.",
    )
    parts = adapters.add_subparsers(title="commands", metavar="COMMAND", required=True, help="what to do")
    for name, run, summary, source, extra in (
        ("merge", _merge, "merge adapters into the weights and write a checkpoint", TRAINED, ""),
        ("to-peft", _to_peft, "write adapters for peft, one directory per model part", TRAINED, CONVERT),
        (
            "from-peft",
            _from_peft,
            "read adapters written by peft or LLaVA",
            "directory that peft or LLaVA wrote",
            CONVERT,
        ),
    ):
        one = parts.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.{extra}")
        one.add_argument("src", type=options.path, metavar="SRC", help=source)
        one.add_argument("dst", type=options.path, metavar="DST", help="directory to write; must not exist")
        options.add_checkpoint(one, "converted model that the adapters belong to")
        one.set_defaults(run=run)


TRAINED = "directory of adapters, written by 'train' or 'from-peft'"
FOREIGN = "directory that peft or LLaVA wrote"
CONVERT = " Needs the extra 'convert'."


def _merge(args: argparse.Namespace) -> int:
    from internvl_jax import lora
    from internvl_jax.inference.loading import NANO

    with counting() as progress:
        lora.merge_checkpoint(
            args.dst, args.checkpoint or NANO, args.src, progress=progress if err.is_terminal else None
        )
    err.print(f"{args.dst}: a merged checkpoint; internvl-jax chat --checkpoint {files.quoted(args.dst)}")
    return 0


def _to_peft(args: argparse.Namespace) -> int:
    from checkpoints_convert.adapters.peft_adapters import export_peft
    from internvl_jax import lora

    config, params = _model(args.checkpoint)
    adapters, settings = lora.load(args.src, params)
    export_peft(args.dst, adapters, settings, config)
    for tower in settings:
        err.print(f"{args.dst / tower}: PeftModel.from_pretrained(model.{tower}, ...)")
    if lora.REPLACED in adapters:
        err.print("non_lora_trainables.bin: weights trained beside the adapters; LLaVA reads it, peft does not")
    return 0


def _from_peft(args: argparse.Namespace) -> int:
    from checkpoints_convert.adapters.peft_adapters import import_peft
    from internvl_jax import lora

    config, params = _model(args.checkpoint)
    adapters, settings = import_peft(args.src, config)
    lora.check(params, adapters)
    lora.save(args.dst, adapters, settings)
    beside = f", and {', '.join(lora.replaced_names(adapters))}" if lora.REPLACED in adapters else ""
    err.print(
        f"{args.dst}: adapters of {', '.join(settings)}{beside}; internvl-jax chat --adapters {files.quoted(args.dst)}"
    )
    return 0


def _model(directory: Path | None):
    import jax.numpy as jnp

    from internvl_jax.config import load_config
    from internvl_jax.inference.loading import NANO, abstract_for_running

    config = load_config(directory or NANO)
    return config, abstract_for_running(config, jnp.float32)
