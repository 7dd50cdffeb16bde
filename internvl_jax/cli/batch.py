"""The `batch` command of `internvl-jax`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from internvl_jax.cli import options
from internvl_jax.utils.progress import counting, err, progress_bar


def add_parser(commands: argparse._SubParsersAction, join: Callable[[argparse.Namespace], None]) -> None:
    """Add `batch` to the commands. join: joins the other processes, where there are any."""
    batch = commands.add_parser(
        "batch",
        help="answer a JSONL file of questions; a run that was stopped goes on where it was",
        description='Reads lines {"question": "...", "images": ["a.jpg"], "id": 7} (images and id may be left out; '
        '"history", "system", "max_new_tokens" and the other settings of an answer may be added) and writes a line '
        "with the answer for each, in the same order. Exit code 1: some questions got an error; the same command asks "
        "them again.",
    )
    batch.add_argument("questions", type=options.path, metavar="QUESTIONS", help="a JSONL file")
    batch.add_argument(
        "--out",
        "--output",
        type=options.path,
        required=True,
        metavar="F",
        help="the JSONL file of answers, made or resumed",
    )
    batch.add_argument(
        "--images", type=options.path, metavar="DIR", help="where relative paths of images start (QUESTIONS' own)"
    )
    batch.add_argument("--checkpoint", type=options.path, metavar="DIR", help="as for chat; default: nano")
    options.add_adapters(batch)
    batch.add_argument(
        "--mesh", metavar="SPEC", help="as for chat; several processes share the work if one's devices can hold it"
    )
    batch.add_argument("--batch", type=options.count, default=8, metavar="N", help="questions at once, per model (8)")
    batch.add_argument("--dtype", choices=["float32", "bfloat16"], help="as for chat")
    options.add_weights(batch)
    options.add_generation(batch)
    options.add_template(batch)
    options.add_processes(batch)
    batch.set_defaults(run=lambda args: _batch(args, join))


def _batch(args: argparse.Namespace, join: Callable[[argparse.Namespace], None]) -> int:
    from internvl_jax.inference import offline
    from internvl_jax.inference.loading import load

    settings = options.generation(args)
    if args.system is not None:
        settings["system"] = args.system
    if args.ignore_exif:
        settings["honour_exif"] = False
    join(args)
    with offline.opened(args.questions, args.out, args.mesh, images=args.images) as work:
        with progress_bar() as progress:
            chat = load(
                args.checkpoint,
                mesh=work.mesh,
                dtype=args.dtype,
                quantize=args.quantize,
                cache_dtype=args.cache_dtype,
                adapters=args.adapters,
                template=args.template,
                progress=progress,
            )
        chat.check_ready()
        with counting() as progress:
            done = offline.run(chat, work, size=args.batch, progress=progress, **settings)
    err.print(
        f"{args.out}: {done.answered} answered in {done.seconds:.0f} s ({done.new_tokens} tokens), {done.failed} "
        f"with an error; {done.found} were there already"
    )
    return 1 if done.failed else 0
