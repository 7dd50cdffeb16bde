"""The `compile-report` command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from internvl_jax.cli import options
from internvl_jax.config import PRESETS
from internvl_jax.utils.progress import err, in_background, print_json

# Options of one kind of program, which are errors with the other.
TRAIN_ONLY = ("recipe", "images_per_row", "remat", "param_dtype")
INFERENCE_ONLY = ("prompt_tokens", "quantize", "cache_dtype")
CHOSEN_BY_PLAN = ("batch_size", "remat", "param_dtype")

# Options whose arguments have another name in internvl_jax.aot.
ARGUMENTS = {"batch_size": "batch", "max_seq_length": "length", "prompt_tokens": "prompt", "images_per_row": "images"}
MAX_SEQ_LENGTH = 2048


def add_parser(commands: options.Commands) -> None:
    """Add `compile-report` to the commands."""
    parser = commands.add_parser(
        "compile-report",
        help="compile for a TPU slice, without a TPU: memory, FLOPs, collectives, time of the schedule",
        description="Compiles the programs for a named TPU slice with the TPU compiler, which needs no TPU, and prints "
        "memory, FLOPs, collectives, rooflines and the time of the schedule per chip. Needs the extra 'tpu'.",
        epilog="examples:\n"
        "  internvl-jax compile-report --topology v5e-8 --program decode --batch-size 8\n"
        "  internvl-jax compile-report --topology v6e:2x2 --mesh tensor=4 --batch-size 16 --json\n"
        "  internvl-jax compile-report --topology v5e-16 --plan\n"
        "  internvl-jax compile-report --topology v5e-16 --program train --recipe stage2 --param-dtype bfloat16",
    )
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="slice: v5e-8, v6e-1, v5p-8, tpu7x or v5e:2x4; with --table several, separated by commas "
        "(default: required; with --table the usual slices)",
    )
    parser.add_argument(
        "--program", default="generate", metavar="NAME", help="encode, prefill, decode, generate (these three) or train"
    )
    parser.add_argument(
        "--preset",
        default="internvl_chat_v1_1",
        metavar="NAME",
        help=f"{', '.join(PRESETS)}, or a checkpoint's directory",
    )
    options.add_mesh(parser, "the largest tensor axis, the rest on data")
    options.add_batch_size(parser, "rows, each with one image (default: 1; with --plan the most that fit)", None)
    options.add_max_seq_length(parser, "tokens of prompt and answer, or of a training row", MAX_SEQ_LENGTH)
    parser.add_argument(
        "--prompt-tokens",
        type=options.count,
        metavar="T",
        help="tokens of the prompt in prefill (default: --max-seq-length)",
    )
    options.add_vision_mode(parser)
    options.add_dtype(parser, "bfloat16")
    parser.add_argument(
        "--flags",
        default="default",
        metavar="FLAGS",
        help="compiler flags: default (those of tpu_scripts/libtpu_flags.env for the chip), none, or for example "
        "--flags=--xla_tpu_scoped_vmem_limit_kib=65536",
    )
    options.add_quantization(parser)
    training = parser.add_argument_group("--program train", "a training step, optimizer moments in float32")
    training.add_argument(
        "--recipe", metavar="NAME", help="as for train; with --table several, separated by commas (default: stage2)"
    )
    training.add_argument(
        "--images-per-row",
        type=options.natural,
        metavar="N",
        help="image slots per row (default: 1; 0 without a vision tower)",
    )
    training.add_argument("--remat", metavar="POLICY", help="full, dots or none (default: full)")
    training.add_argument(
        "--param-dtype", choices=options.DTYPES, help="dtype of trained parameters (default: float32)"
    )
    parser.add_argument("--plan", action="store_true", help="choose mesh and batch; for training, remat and dtype")
    parser.add_argument("--table", action="store_true", help="plan for several slices and print Markdown (slow)")
    parser.add_argument(
        "--dump-hlo",
        type=options.path,
        metavar="DIR",
        help="directory for the optimized HLO of each program, PROGRAM.txt (default: none)",
    )
    options.add_json(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    training = args.program == "train"
    for name in INFERENCE_ONLY if training else TRAIN_ONLY:
        if getattr(args, name) is not None:
            where = "does not apply to" if training else "belongs to"
            args.parser.error(f"{_flag(name)} {where} --program train")
    if (args.plan or args.table) and args.mesh:
        args.parser.error("--plan and --table choose the mesh: leave --mesh out, or both of them")
    if training and (args.plan or args.table) and options.given(args, CHOSEN_BY_PLAN):
        args.parser.error("--plan and --table choose --batch-size, --remat and --param-dtype: leave them out")
    if args.dump_hlo and (args.plan or args.table):
        args.parser.error("--dump-hlo belongs to one report: leave out --plan and --table")
    if args.table and args.json:
        args.parser.error("--table prints Markdown: leave --json out, or name one slice with --plan --json")
    if not args.table and not args.topology:
        args.parser.error("name the slice: --topology v5e-8 for example")
    return in_background(lambda: (_train if training else _inference)(args), "compiling")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _request(args: argparse.Namespace, kind: Any) -> Any:
    """A WorkloadRequest or TrainRequest from the options that have a value."""
    names = {ARGUMENTS.get(name, name): value for name, value in vars(args).items() if value is not None}
    given = {field.name: names[field.name] for field in fields(kind) if field.name in names}
    return kind(**{"topology": ""} | given)


def _inference(args: argparse.Namespace) -> int:
    from internvl_jax.aot import compile_report, planner
    from internvl_jax.aot.workload import WorkloadRequest, make_workload

    request = _request(args, WorkloadRequest)
    if args.table:
        slices = args.topology.split(",") if args.topology else planner.SLICES
        for line in planner.plan_table(request, slices, log=err.print):
            print(line, flush=True)
    elif args.plan:
        _show(planner.plan_mesh(request, log=err.print), args.json, planner.format_plan)
    else:
        report = compile_report.make_report(make_workload(request), args.program, args.dump_hlo)
        _show(report, args.json, compile_report.format_report)
    return 0


def _train(args: argparse.Namespace) -> int:
    from internvl_jax.aot import train_report

    request = _request(args, train_report.TrainRequest)
    if args.table:
        slices = args.topology.split(",") if args.topology else train_report.SLICES
        recipes = args.recipe.split(",") if args.recipe else train_report.RECIPES
        for line in train_report.train_table(request, slices, recipes, log=err.print):
            print(line, flush=True)
        return 0
    if args.plan:
        report = train_report.plan_training(request, log=err.print)
    else:
        report = train_report.make_train_report(train_report.make_train_workload(request), args.dump_hlo)
    if report is None:
        print("nothing fits: choose a larger slice, shorter rows or adapters (--recipe lora)")
        return 0
    _show(report, args.json, train_report.format_train_report)
    return 0


def _show(report: Any, as_json: bool, lines: Callable[[Any], list[str]]) -> None:
    if as_json:
        print_json(report.to_dict())
    else:
        print("\n".join(lines(report)))
