"""The `train` command of `internvl-jax`."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

from internvl_jax.cli import options
from internvl_jax.utils.progress import counting, err

logger = logging.getLogger(__name__)

RECIPES = "stage1, stage2, full, lora, lora-both, llava-pretrain or llava-finetune"  # recipes.RECIPES needs jax
EXAMPLES = """\
examples:
  internvl-jax train lora --data meta.json --output runs/mine
  internvl-jax train stage2 --checkpoint InternVL-Chat-V1-1-jax --data meta.json --output runs/stage2 \\
      --mesh fsdp=16 --rows 128 --accumulate 2

The same command goes on where a run was stopped or killed. docs/training.md explains recipes, data and meshes."""


def add_parser(
    commands: argparse._SubParsersAction,
    add_processes: Callable[[argparse.ArgumentParser], None],
    join: Callable[[argparse.Namespace], None],
) -> None:
    """Add `train` to the commands. join: joins the other processes, where there are any."""
    train = commands.add_parser(
        "train",
        help="fine-tune a model on conversations about pictures",
        description="Trains a recipe's parts of a converted checkpoint on InternVL's meta files, JSONL or LLaVA's\n"
        "JSON, saves as it goes, and writes OUTPUT/model. Needs the extra 'train'. Exit code 1: it was stopped,\n"
        "and the same command goes on.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("recipe", metavar="RECIPE", help=RECIPES)
    train.add_argument(
        "--data", type=options.path, required=True, metavar="META", help="a meta JSON, JSONL, or LLaVA's JSON"
    )
    train.add_argument(
        "--output", type=options.path, required=True, metavar="DIR", help="the run's directory: new, or its own"
    )
    train.add_argument("--checkpoint", type=options.path, metavar="DIR", help="a converted model to begin with (nano)")
    train.add_argument(
        "--base", type=options.path, metavar="DIR", help="where relative paths in META start (its directory)"
    )
    _add_recipe(train.add_argument_group("the recipe's numbers (its own)"))
    _add_machine(train.add_argument_group("the machine"))
    _add_run(train.add_argument_group("the run"))
    add_processes(train)
    train.set_defaults(run=lambda args: _train(args, join))


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--learning-rate", type=float, metavar="X", help="at its peak")
    group.add_argument("--weight-decay", type=float, metavar="X", help="AdamW's, of matrices and embeddings")
    group.add_argument("--warmup", type=float, metavar="X", help="below 1 of all steps, from 1 on steps")
    group.add_argument("--clip", type=float, metavar="X", help="the gradient's largest norm")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, metavar="N", help="times through the data")
    length.add_argument("--steps", type=int, metavar="N", help="optimizer steps, instead of epochs")
    group.add_argument("--rows", type=int, metavar="B", help="of a step, over all devices and parts")
    group.add_argument("--length", type=int, metavar="T", help="tokens of a row (or the context, if it is shorter)")
    group.add_argument("--mean", choices=["token", "device"], help="what the loss is a mean over")
    group.add_argument("--z-loss", type=float, metavar="X", help="weight of the squared log normaliser")
    group.add_argument("--drop-path", type=float, metavar="X", help="stochastic depth in a tower that is trained")
    group.add_argument("--train", nargs="+", metavar="PART", help="vision_model, mlp1, language_model; beside adapters")
    group.add_argument("--lora-rank", type=int, metavar="R", help="of adapters; alpha becomes twice of it")
    group.add_argument("--lora-alpha", type=float, metavar="X", help="adapters are scaled by alpha / rank")
    group.add_argument("--lora-dropout", type=float, metavar="X", help="of what adapters read, 0 to 1")
    group.add_argument("--lora-targets", nargs="+", metavar="LAYER", help="q_proj v_proj, ... (all linear layers)")
    group.add_argument("--image-size", type=int, metavar="S", help="resize the tower to S pixels before stage 1")
    group.add_argument(
        "--augmentation", choices=["crop", "jpeg", "none"], default="crop", help="where META asks (crop)"
    )
    group.add_argument("--no-packing", action="store_true", help="one conversation a row")
    group.add_argument("--buckets", type=int, nargs="+", default=[], metavar="T", help="shorter rows; not packed then")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--mesh", metavar="SPEC", help="for example fsdp=16 or data=2,tensor=4 (one device)")
    group.add_argument("--vision", choices=["tensor", "data"], help="how the tower lies on the mesh (the mesh decides)")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], help="to compute in (bfloat16; float32 on CPU)")
    group.add_argument(
        "--param-dtype", choices=["float32", "bfloat16"], default="float32", help="of what is trained (float32)"
    )
    group.add_argument("--remat", choices=["full", "dots", "none"], default="full", help="what is made again (full)")
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help="parts of a step, one after another (1)")
    group.add_argument("--images", type=int, metavar="M", help="image slots of a process's batch (the data decide)")
    group.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read data (0: threads)")


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of data order, dropout, adapters (0)")
    group.add_argument("--save-every", type=int, default=500, metavar="N", help="steps (500)")
    group.add_argument("--keep", type=int, default=3, metavar="N", help="saved steps (3)")
    group.add_argument("--log-every", type=int, default=10, metavar="N", help="steps between printed lines (10)")
    group.add_argument(
        "--eval-data", type=options.path, metavar="META", help="held-out data: loss, accuracy, a few answers"
    )
    group.add_argument("--eval-every", type=int, default=500, metavar="N", help="steps, and at the end (500)")
    group.add_argument("--eval-batches", type=int, default=16, metavar="N", help="batches of it, at most (16)")
    group.add_argument("--answers", type=int, default=3, metavar="N", help="answers to print (3)")
    group.add_argument("--data-errors", choices=["skip", "fatal"], default="skip", help="conversations that are wrong")
    group.add_argument(
        "--from-scratch", action="store_true", help="begin at step 1 although OUTPUT has saved steps, which are kept"
    )
    group.add_argument("--tensorboard", action="store_true", help="write OUTPUT/tensorboard")
    group.add_argument(
        "--profile", action="store_true", help="write a trace of a few steps to OUTPUT/profile, for xprof"
    )


def _train(args: argparse.Namespace, join: Callable[[argparse.Namespace], None]) -> int:
    from internvl_jax.training.recipes import override, recipe_of

    recipe = override(
        recipe_of(args.recipe),
        optimizer={name: getattr(args, name) for name in ("learning_rate", "weight_decay", "warmup", "clip")},
        lora_rank=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        lora_targets=args.lora_targets,
        epochs=args.epochs,
        rows=args.rows,
        mean=args.mean,
        z_loss=args.z_loss,
        drop_path=args.drop_path,
        train=None if args.train is None else tuple(args.train),
    )
    for name, least in {"eval_batches": 1, "log_every": 1, "answers": 0, "workers": 0}.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {least}")
    if importlib.util.find_spec("grain") is None:
        raise ImportError("training reads its data with grain: pip install 'internvl-jax[train]'")

    from internvl_jax.parallel import distributed
    from internvl_jax.training import reporting, run, saving

    if args.tensorboard:
        reporting.require_board()
    join(args)
    names = (
        "data output checkpoint base steps length images accumulate image_size mesh vision dtype param_dtype remat "
        "seed workers save_every keep eval_data eval_every eval_batches answers profile from_scratch"
    ).split()
    values: dict[str, Any] = {name: getattr(args, name) for name in names}
    options = run.Options(
        recipe,
        **values,
        buckets=tuple(args.buckets),
        packed=not args.no_packing,
        fatal=args.data_errors == "fatal",
        augmentation=None if args.augmentation == "none" else args.augmentation,
    )
    skipped = reporting.Skipped()
    with saving.claimed(args.output):
        with counting() as progress:
            made = run.prepare(options, report=skipped, progress=progress if err.is_terminal else None)
        with run.log_file(made):
            if distributed.is_first():
                for line in run.summary(made):
                    logger.info("%s", line)
            board = args.output / run.TENSORBOARD if args.tensorboard else None
            outcome = None
            if not made.done:
                with reporting.reporting(made.settings.steps, args.log_every, board) as reporter:
                    outcome = run.start(made, log=reporter.log, tell=reporter.answer, progress=reporter.progress)
            if distributed.is_first():
                for line in (*skipped.lines(), *run.result(made, outcome)):
                    logger.info("%s", line)
    return 0 if outcome is None or outcome.finished else 1
