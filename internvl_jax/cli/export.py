"""The `export` command."""

from __future__ import annotations

import argparse

from internvl_jax.cli import options
from internvl_jax.utils.progress import err, progress_bar


def add_parser(commands: options.Commands) -> None:
    """Add `export` to the commands."""
    parser = commands.add_parser(
        "export",
        help="write a converted checkpoint in its published PyTorch layout",
        description="Reads SRC, a directory that 'convert' or 'train' wrote, and writes DST with the published key "
        "names, bit for bit. Needs the extra 'convert'.",
    )
    parser.add_argument("src", type=options.path, metavar="SRC", help="converted directory")
    parser.add_argument("dst", type=options.path, metavar="DST", help="directory to write; must not exist")
    parser.add_argument(
        "--safetensors", action="store_true", help="write model-*.safetensors instead of pytorch_model-*.bin"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from checkpoints_convert.export import export

    with progress_bar() as progress:
        report = export(args.src, args.dst, safe_serialization=args.safetensors or None, progress=progress)
    err.print(report.summary())
    return 0
