"""The `data` commands."""

from __future__ import annotations

import argparse

from internvl_jax.cli import options
from internvl_jax.utils.progress import counting, print_json, stdout_console


def add_parser(commands: options.Commands) -> None:
    """Add `data` to the commands."""
    data = commands.add_parser(
        "data",
        help="validate training data",
        description="Reads conversations about images as training would: InternVL's meta files over JSONL, or LLaVA's "
        "JSON.",
    )
    parts = data.add_subparsers(title="commands", metavar="COMMAND", required=True, help="what to do")
    check = parts.add_parser(
        "check",
        help="validate data sets, print statistics and a few samples",
        description="Builds every sample of META as training would, images included, and prints statistics of each "
        "data set, every invalid entry, and a few samples with the supervised text between ⟦ and ⟧. Exit code 0: all "
        "entries are valid. Needs the extra 'train'.",
    )
    check.add_argument(
        "meta", type=options.path, metavar="META", help="meta JSON, JSONL of conversations, or LLaVA's JSON"
    )
    options.add_checkpoint(check, "model to be trained")
    check.add_argument(
        "--root",
        type=options.path,
        metavar="DIR",
        help="directory that relative paths in META start from (default: that of META)",
    )
    options.add_max_seq_length(
        check, "tokens per row; several are buckets (default: 2048, or the context)", None, nargs="+"
    )
    options.add_batch_size(check, "rows per batch", 8)
    check.add_argument(
        "--image-slots", type=options.natural, metavar="N", help="image slots in a batch (default: 4 per row)"
    )
    check.add_argument("--no-packing", action="store_true", help="one conversation per row")
    check.add_argument("--images-first", action="store_true", help="move <image> to the front, as LLaVA does")
    check.add_argument("--skip-images", action="store_true", help="do not open the images")
    check.add_argument(
        "--limit", type=options.count, metavar="N", help="entries of each data set, drawn at random (default: all)"
    )
    check.add_argument("--show", type=options.natural, default=3, metavar="N", help="samples of each data set to print")
    options.add_json(check)
    check.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    from internvl_jax.config import load_config
    from internvl_jax.data import check
    from internvl_jax.data.packing import Layout
    from internvl_jax.inference.loading import NANO

    checkpoint = args.checkpoint or NANO
    lengths = args.max_seq_length or [min(2048, load_config(checkpoint).required_text.max_position_embeddings)]
    slots = 4 * args.batch_size if args.image_slots is None else args.image_slots
    with counting() as progress:
        report, tokenizer = check.check(
            args.meta,
            checkpoint,
            Layout(args.batch_size, tuple(lengths), slots, packed=not args.no_packing),
            check.CheckOptions(args.limit, args.show),
            base=args.root,
            progress=progress,
            images_first=args.images_first,
            with_pixels=not args.skip_images,
        )
    if args.json:
        print_json(report.to_dict())
    else:
        check.print_report(report, tokenizer, stdout_console())
    return 1 if report.problems else 0
