"""The `bench` command."""

from __future__ import annotations

import argparse

from internvl_jax.cli import options
from internvl_jax.config import PRESETS
from internvl_jax.utils.progress import counting, print_json


def add_parser(commands: options.Commands) -> None:
    """Add `bench` to the commands."""
    parser = commands.add_parser(
        "bench",
        help="measure speed and memory on the devices of this machine",
        description="Times image encoding, prefill and decoding; on a TPU with MFU and the fraction of the roofline.",
    )
    model = parser.add_mutually_exclusive_group()
    options.add_checkpoint(model, "checkpoint to measure", default="the preset")
    model.add_argument(
        "--preset", default="nano", metavar="NAME", help=f"model to measure with random weights: {', '.join(PRESETS)}"
    )
    parser.add_argument(
        "--batch-size", type=options.count, nargs="+", default=[1, 8], metavar="N", help="batch sizes to measure"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=options.count,
        metavar="T",
        help="length of each prompt (default: 512, or what the context has room for)",
    )
    options.add_mesh(parser)
    options.add_dtype(parser)
    options.add_quantization(parser)
    parser.add_argument(
        "--profile", type=options.path, metavar="DIR", help="write a trace of each program for xprof (default: none)"
    )
    options.add_json(parser)
    options.add_processes(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from internvl_jax.inference import bench

    options.start_processes(args)
    with counting() as progress:
        result = bench.run(
            args.batch_size,
            checkpoint=args.checkpoint,
            preset=None if args.checkpoint else args.preset,
            options=options.load_options(args, images_per_call=max(args.batch_size)),
            prompt_tokens=args.prompt_tokens,
            profile=args.profile,
            progress=progress,
        )
    if args.json:
        print_json(result.to_dict())
    else:
        print("\n".join(bench.lines(result)))
    return 0
