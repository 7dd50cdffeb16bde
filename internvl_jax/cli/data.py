"""The `data` commands of `internvl-jax`."""

from __future__ import annotations

import argparse

from rich.console import Console

from internvl_jax.cli import options
from internvl_jax.utils.progress import counting, print_json


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `data` to the commands."""
    data = commands.add_parser(
        "data",
        help="look at training data",
        description="Looks at conversations about pictures as training would read them, before a slice is paid for: "
        "InternVL's meta files over JSONL, or LLaVA's JSON.",
    )
    checks = data.add_subparsers(title="commands", metavar="COMMAND", required=True, help="what to look at")
    check = checks.add_parser(
        "check",
        help="validate a data set and print statistics and a few samples",
        description="Makes every sample of META as training would, pictures and all, and prints what is in the data "
        "sets, every entry that cannot be used, and a few samples with what is learned between ⟦ and ⟧. Exit code 0: "
        "all can be used. Needs the extra 'train'.",
    )
    check.add_argument(
        "meta", type=options.path, metavar="META", help="a meta JSON, a JSONL of conversations, or LLaVA's JSON"
    )
    check.add_argument("--checkpoint", type=options.path, metavar="DIR", help="the model to be trained (nano)")
    check.add_argument("--base", type=options.path, metavar="DIR", help="where relative paths start (META's directory)")
    check.add_argument(
        "--length", type=options.count, nargs="+", metavar="T", help="tokens of a row (2048, or the context)"
    )
    check.add_argument("--rows", type=options.count, default=8, metavar="B", help="of a batch (8)")
    check.add_argument("--images", type=options.natural, metavar="M", help="image slots of a batch (4 a row)")
    check.add_argument("--no-packing", action="store_true", help="one sample a row; several lengths are buckets")
    check.add_argument("--images-first", action="store_true", help="move <image> to the front, as LLaVA does")
    check.add_argument(
        "--limit", type=options.count, metavar="N", help="look at N entries of each data set, drawn at random"
    )
    check.add_argument("--no-pictures", action="store_true", help="do not open the pictures")
    check.add_argument(
        "--show", type=options.natural, default=3, metavar="N", help="samples of each data set to print (3)"
    )
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    from internvl_jax.config import ChatConfig
    from internvl_jax.data import check
    from internvl_jax.data.packing import Layout
    from internvl_jax.inference.loading import NANO

    checkpoint = args.checkpoint or NANO
    lengths = args.length or [min(2048, ChatConfig.from_file(checkpoint).text.max_position_embeddings)]
    images = 4 * args.rows if args.images is None else args.images
    with counting() as progress:
        report, tokenizer = check.check(
            args.meta,
            checkpoint,
            Layout(args.rows, tuple(lengths), images, packed=not args.no_packing),
            limit=args.limit,
            show=args.show,
            base=args.base,
            progress=progress,
            images_first=args.images_first,
            with_pixels=not args.no_pictures,
        )
    if args.json:
        print_json(report.to_dict())
    else:
        check.show(report, tokenizer, Console(highlight=False, markup=False, emoji=False, soft_wrap=True))
    return 1 if report.problems else 0
