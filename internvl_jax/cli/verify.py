"""The `verify` command."""

from __future__ import annotations

import argparse

from internvl_jax.cli import options
from internvl_jax.utils import formats
from internvl_jax.utils.progress import err, progress_bar


def add_parser(commands: options.Commands) -> None:
    """Add `verify` to the commands."""
    parser = commands.add_parser(
        "verify",
        help="read a whole converted checkpoint and check it",
        description="Reads CHECKPOINT, a directory that 'convert' or 'train' wrote, and checks the size and checksum "
        "of every file, and that every number is finite. Loading checks the same for what it reads.",
    )
    parser.add_argument("checkpoint", type=options.path, metavar="CHECKPOINT", help="converted directory")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from internvl_jax import checkpoint

    with progress_bar() as progress:
        size, summed = checkpoint.verify(args.checkpoint, progress=progress)
    checked = "sizes, checksums and numbers checked" if summed else "sizes and numbers checked; it has no checksums"
    err.print(f"{args.checkpoint}: {formats.disk(size)}, {checked}")
    return 0
