"""The `convert` command."""

from __future__ import annotations

import argparse

from internvl_jax.cli import options
from internvl_jax.utils.progress import err, progress_bar


def add_parser(commands: options.Commands) -> None:
    """Add `convert` to the commands."""
    parser = commands.add_parser(
        "convert",
        help="convert a published PyTorch checkpoint to this project's format",
        description="Reads SRC, a downloaded Hugging Face directory (pytorch_model-*.bin or model-*.safetensors), and "
        "writes DST with the weights in Orbax format, config.json and the tokenizer. The architecture is read from "
        "config.json: InternVL-Chat-V1-1 or V1-0, LLaVA-1.5 (its own layout or that of transformers), InternViT, "
        "Llama. Needs the extra 'convert'.",
    )
    parser.add_argument("src", type=options.path, metavar="SRC", help="published directory")
    parser.add_argument("dst", type=options.path, metavar="DST", help="directory to write; must not exist")
    parser.add_argument(
        "--quantize",
        choices=["int8", "int4"],
        help="write quantized weights; int4 applies to the language model's layers (default: as published)",
    )
    parser.add_argument(
        "--force-int4-vision",
        action="store_true",
        help="with --quantize int4: quantize the vision tower too, which ruins InternViT-6B",
    )
    options.add_vision_tower(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.force_int4_vision and args.quantize != "int4":
        args.parser.error("--force-int4-vision goes with --quantize int4")
    from checkpoints_convert.convert import convert
    from internvl_jax.quantize import Scheme

    scheme = args.quantize and Scheme(args.quantize, args.force_int4_vision)
    with progress_bar() as progress:
        report = convert(args.src, args.dst, quantize=scheme, vision_tower=args.vision_tower, progress=progress)
    err.print(report.summary())
    return 0
