"""The `internvl-jax` command. Results go to stdout; progress and messages to stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import internvl_jax
from internvl_jax.cli import (
    adapters,
    batch,
    bench,
    chat,
    compile_report,
    convert,
    data,
    eval,
    export,
    options,
    parity,
    runner,
    serve,
    train,
    verify,
)

COMMANDS = (chat, batch, serve, convert, export, verify, parity, compile_report, bench, train, eval, data, adapters)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name. None: those of this process.

    Returns:
        The exit code: 0 for success, 1 for a failed check, 2 for an error that the user can fix.
    """

    def command() -> int:
        parser = build_parser()
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        if args.run is None:
            args.parser.print_help()
            return 0
        return args.run(args)

    return runner.run_command(command)


class _Version(argparse.Action):
    """Prints the version; its lookup in the package's metadata is too slow for every start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"internvl-jax {internvl_jax.__version__}")
        parser.exit()


def build_parser() -> options.Parser:
    """The parser of all commands."""
    parser = options.Parser(
        prog="internvl-jax",
        description="InternVL-Chat-V1-1, InternVL-Chat-V1-0 and LLaVA-1.5 in JAX: chat about images, convert and "
        "verify checkpoints, train, evaluate, and compile for TPUs.",
        epilog="Start with: internvl-jax chat --image internvl_jax/nano/images/shapes.png 'How many shapes are "
        "there?'\n'internvl-jax COMMAND --help' explains each command.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in COMMANDS:
        module.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
