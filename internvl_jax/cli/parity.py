"""The `parity` command."""

from __future__ import annotations

import argparse

from internvl_jax.cli import options
from internvl_jax.utils.progress import print_json, progress_bar, stdout_console


def add_parser(commands: options.Commands) -> None:
    """Add `parity` to the commands."""
    parser = commands.add_parser(
        "parity",
        help="compare this implementation with PyTorch, layer by layer",
        description="Runs the PyTorch reference and this project on the same image and prompt, one layer at a time "
        "from disk, and prints the error of each stage. Exit code 0: all stages are within tolerance. Needs the extra "
        "'convert'.",
    )
    parser.add_argument("checkpoint", type=options.path, metavar="CHECKPOINT", help="published or converted directory")
    parser.add_argument(
        "--reference",
        type=options.path,
        metavar="DIR",
        help="published directory to compare with (default: CHECKPOINT itself)",
    )
    parser.add_argument("--image", type=options.path, metavar="FILE", help="image (default: a generated test image)")
    parser.add_argument("--prompt", metavar="TEXT", help="question (default: a request for a description)")
    options.add_vision_tower(parser)
    options.add_json(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from checkpoints_convert.parity.run import run_parity

    with progress_bar() as progress:
        report = run_parity(
            args.checkpoint,
            image=args.image,
            prompt=args.prompt,
            reference=args.reference,
            vision_tower=args.vision_tower,
            progress=progress,
        )
    if args.json:
        print_json(report.to_dict())
    else:
        report.print(stdout_console())
    return 0 if report.passed else 1
