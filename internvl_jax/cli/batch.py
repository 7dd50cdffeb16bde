"""The `batch` command."""

from __future__ import annotations

import argparse

from internvl_jax.cli import options
from internvl_jax.utils import formats
from internvl_jax.utils.progress import counting, err, progress_bar


def add_parser(commands: options.Commands) -> None:
    """Add `batch` to the commands."""
    parser = commands.add_parser(
        "batch",
        help="answer a JSONL file of questions; an interrupted run resumes",
        description='Reads lines {"question": "...", "images": ["a.jpg"], "id": 7} and writes one line with the answer '
        'for each, in the same order. "images" and "id" are optional; "history", "system", "max_new_tokens" and the '
        "other generation settings may be added. Exit code 1: some questions failed; the same command retries them.",
    )
    parser.add_argument("questions", type=options.path, metavar="QUESTIONS", help="JSONL file of questions")
    options.add_output(parser, "JSONL file of answers, created or resumed", required=True, metavar="FILE")
    parser.add_argument(
        "--root",
        type=options.path,
        metavar="DIR",
        help="directory that relative paths start from (default: that of QUESTIONS)",
    )
    options.add_batch_size(parser, "questions per batch and model replica", 8)
    options.add_model(parser, "one device per process; processes share the work")
    options.add_generation(parser)
    options.add_processes(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from internvl_jax.inference import offline
    from internvl_jax.inference.loading import load

    settings = options.question_options(args)
    options.start_processes(args)
    with offline.claim(args.questions, args.output, args.mesh, root=args.root) as job:
        with progress_bar() as progress:
            loaded = options.load_options(args, images_per_call=args.batch_size)
            chat = load(args.checkpoint, loaded, mesh=job.mesh, progress=progress)
        chat.check_ready()
        with counting() as progress:
            done = offline.run(chat, job, batch_size=args.batch_size, progress=progress, **settings)
    err.print(
        f"{args.output}: {done.answered:,} answered in {formats.duration(done.seconds)} ({done.new_tokens:,} tokens), "
        f"{done.failed:,} failed, {done.resumed:,} were already answered"
    )
    return 1 if done.failed else 0
