"""The `internvl-jax` command: argv in, printing out. Answers go to stdout; progress and messages to stderr."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from internvl_jax.cli import adapters, batch, options, train
from internvl_jax.cli import data as training_cli
from internvl_jax.cli import eval as evaluation_cli
from internvl_jax.config import PRESETS
from internvl_jax.processing.images import load_image, read_once
from internvl_jax.utils import entry, files
from internvl_jax.utils.progress import counting, err, print_json, progress_bar, status

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")

INTERACTIVE_HELP = """\
  /image FILE   show the model an image with the next question (several: repeat it, then ask)
  /clear        forget the images and the conversation
  /help         this text
  /quit         leave (Ctrl-D too); Ctrl-C stops an answer, not the program"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 a failed check, 2 an error that the user can mend."""

    def command() -> int:
        parser = _parser()
        args = parser.parse_args(argv)
        if args.run is None:
            parser.print_help()
            return 0
        return args.run(args)

    return entry.run(command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="internvl-jax",
        description="InternVL-Chat-V1-1, InternVL-Chat-V1-0 and LLaVA-1.5 in JAX: chat about images, convert "
        "checkpoints, check the numbers, run the benchmarks.",
        epilog="To begin: internvl-jax chat --image photo.jpg 'What is in this picture?'\n"
        "'internvl-jax COMMAND --help' explains each command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    chat = commands.add_parser(
        "chat",
        help="ask a question about images, or talk in a session",
        description="Answers a question, about pictures if there are any. Without --checkpoint it goes to 'nano', the\n"
        "small model that ships with the project. Without a PROMPT a session starts.\n\nexamples:\n"
        "  internvl-jax chat --image photo.jpg 'What is in this picture?'\n"
        "  internvl-jax chat --checkpoint ./InternVL-Chat-V1-1-jax",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chat.add_argument("prompt", nargs="*", metavar="PROMPT", help="the question; '-' reads it from standard input")
    chat.add_argument(
        "--checkpoint", type=options.path, metavar="DIR", help="a converted directory, or a published one as is"
    )
    options.add_adapters(chat)
    chat.add_argument(
        "--image", type=options.path, action="append", default=[], metavar="F", help="an image; repeatable"
    )
    chat.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="to compute in; default: bfloat16 on TPU/GPU, float32 on CPU"
    )
    chat.add_argument(
        "--mesh",
        metavar="SPEC",
        help="spread the model over several devices, for example tensor=8 or data=2,tensor=4 (default: one device)",
    )
    options.add_weights(chat)
    options.add_generation(chat)
    options.add_template(chat)
    chat.add_argument("--json", action="store_true", help="print one JSON object: answer, tokens, finish_reason, ...")
    options.add_processes(chat)
    chat.set_defaults(run=_chat)

    convert = commands.add_parser(
        "convert",
        help="turn a published PyTorch checkpoint into this project's format",
        description="Reads SRC, a downloaded Hugging Face directory (pytorch_model-*.bin or model-*.safetensors), and "
        "writes DST with the weights in Orbax format, config.json and tokenizer. Its config.json says what it is: "
        "InternVL-Chat-V1-1 or V1-0, LLaVA-1.5 (its own layout or transformers'), InternViT, Llama. Needs the extra "
        "'convert'.",
    )
    convert.add_argument("src", type=options.path, metavar="SRC", help="the published directory")
    convert.add_argument("dst", type=options.path, metavar="DST", help="the directory to write; must not exist")
    convert.add_argument(
        "--quantize", choices=["int8", "int4"], help="write weights of 8 bits, or 4 in the LLM's layers"
    )
    convert.add_argument(
        "--force-int4-vision", action="store_true", help="with --quantize int4: the tower too, which ruins InternViT-6B"
    )
    _add_vision_tower(convert)
    convert.set_defaults(run=_convert)

    export = commands.add_parser(
        "export",
        help="write a converted checkpoint back in its published PyTorch layout",
        description="Reads SRC, a directory that 'convert' or training wrote, and writes DST with the published key "
        "names, bit for bit. Needs the extra 'convert'.",
    )
    export.add_argument("src", type=options.path, metavar="SRC", help="the converted directory")
    export.add_argument("dst", type=options.path, metavar="DST", help="the directory to write; must not exist")
    export.add_argument("--safetensors", action="store_true", help="write model-*.safetensors, not pytorch_model-*.bin")
    export.set_defaults(run=_export)

    verify = commands.add_parser(
        "verify",
        help="read all of a converted checkpoint and check it",
        description="Reads DIR, a directory that 'convert' or training wrote, and checks every file's size and "
        "checksum, and that every number is finite. Loading checks the same of what it reads.",
    )
    verify.add_argument("directory", type=options.path, metavar="DIR", help="the converted directory")
    verify.set_defaults(run=_verify)

    parity = commands.add_parser(
        "parity",
        help="compare this implementation with PyTorch's, layer by layer",
        description="Runs the PyTorch reference and this project on the same picture and prompt, one layer at a time "
        "from disk, and prints how far each stage differs. Exit code 0: all within tolerance. Needs the extra "
        "'convert'.",
    )
    parity.add_argument(
        "checkpoint", type=options.path, metavar="CHECKPOINT", help="a published or a converted directory"
    )
    parity.add_argument("--reference", type=options.path, metavar="DIR", help="the published directory to compare with")
    parity.add_argument("--image", type=options.path, metavar="F", help="an image (default: a drawn test image)")
    parity.add_argument("--prompt", metavar="P", help="a question (default: a description is asked for)")
    _add_vision_tower(parity)
    parity.add_argument("--json", action="store_true", help="print one JSON object")
    parity.set_defaults(run=_parity)
    report = commands.add_parser(
        "compile-report",
        help="compile for a TPU slice that is not here: what fits, and how fast it can be at most",
        description="Compiles the programs that run for a named TPU slice with the TPU's own compiler, which needs no "
        "TPU, and prints memory, FLOPs, collectives and rooflines per chip. Needs the extra 'tpu'.\n\nexamples:\n"
        "  internvl-jax compile-report --topology v5e-8 --program decode --batch 8 --length 2048\n"
        "  internvl-jax compile-report --topology v6e:2x2 --mesh tensor=4 --batch 16 --json\n"
        "  internvl-jax compile-report --topology v5e-16 --plan\n"
        "  internvl-jax compile-report --topology v5e-16 --program train --recipe stage2 --param-dtype bfloat16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("--topology", metavar="T", help="v5e-8, v6e-1, v5p-8, tpu7x or v5e:2x4")
    report.add_argument(
        "--program",
        default="generate",
        metavar="P",
        help="encode, prefill, decode, generate (all of them together), or train",
    )
    report.add_argument(
        "--preset", default="internvl_chat_v1_1", metavar="M", help=f"{', '.join(PRESETS)}; or a directory's"
    )
    report.add_argument("--mesh", metavar="SPEC", help="like data=2,tensor=4 (the largest tensor axis, rest on data)")
    report.add_argument(
        "--batch", type=options.count, metavar="N", help="rows, each with one image (1; --plan: what fits)"
    )
    report.add_argument(
        "--length", type=options.count, default=2048, metavar="T", help="tokens of prompt and answer (2048)"
    )
    report.add_argument(
        "--prompt", type=options.count, metavar="T", help="tokens of the prompt that prefill reads (length)"
    )
    report.add_argument("--vision", metavar="MODE", help="spread the tower by 'tensor' or 'data' (the mesh decides)")
    report.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="default: bfloat16")
    options.add_weights(report)
    training = report.add_argument_group("--program train", "a step of the trainer, moments in float32")
    training.add_argument("--recipe", metavar="R", help="as for train (stage2); --table: R,R,...")
    training.add_argument("--images", type=options.natural, metavar="N", help="images in a row (1)")
    training.add_argument("--remat", metavar="POLICY", help="full, dots or none (full)")
    training.add_argument("--param-dtype", choices=["float32", "bfloat16"], help="of what is trained (float32)")
    report.add_argument("--plan", action="store_true", help="choose mesh and batch; of training, remat and dtype")
    report.add_argument("--table", action="store_true", help="plan for all usual slices, or T,T,...; Markdown (slow)")
    report.add_argument("--json", action="store_true", help="print one JSON object")
    report.set_defaults(run=_compile_report)

    bench = commands.add_parser(
        "bench",
        help="measure speed and memory on the devices that are here",
        description="Times encoding of images, reading of prompts and decoding of tokens, on a TPU with MFU and the "
        "fraction of the roofline.",
    )
    model = bench.add_mutually_exclusive_group()
    model.add_argument("--checkpoint", type=options.path, metavar="DIR", help="as for chat")
    model.add_argument(
        "--preset",
        default="nano",
        metavar="M",
        help="random weights in the sizes of M (nano): a name as for compile-report",
    )
    bench.add_argument("--mesh", metavar="SPEC", help="as for chat")
    bench.add_argument("--dtype", choices=["float32", "bfloat16"], help="as for chat")
    bench.add_argument(
        "--batch", type=options.count, nargs="+", default=[1, 8], metavar="N", help="images and rows at once (1 8)"
    )
    bench.add_argument(
        "--prompt-tokens", type=options.count, metavar="T", help="of each prompt (512, if the context has room)"
    )
    bench.add_argument(
        "--profile", type=options.path, metavar="DIR", help="write a trace of each program there, for xprof"
    )
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_weights(bench)
    options.add_processes(bench)
    bench.set_defaults(run=_bench)

    batch.add_parser(commands, _join)
    train.add_parser(commands, options.add_processes, _join)
    adapters.add_parser(commands)
    training_cli.add_parser(commands)
    evaluation_cli.add_parser(commands, options.add_weights_and_processes, _join)
    return parser


def _add_vision_tower(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vision-tower",
        type=options.path,
        metavar="DIR",
        help="of LLaVA-1.5 and InternVL-Chat-V1-0: the tower's directory (default: in the checkpoint's, or beside it, "
        "under the name that config.json has for it)",
    )


def _join(args: argparse.Namespace) -> None:
    """Join the other processes, where there are any. Afterwards only process 0 prints to stdout."""
    from internvl_jax.parallel import distributed

    distributed.start(args.coordinator, args.num_processes, args.process_id, wait_seconds=args.wait)
    if not distributed.is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def _chat(args: argparse.Namespace) -> int:
    prompt = _prompt(args.prompt)
    if prompt is None and args.json:
        raise ValueError("--json prints one answer: give it a PROMPT")
    images = [read_once(path) for path in args.image]
    for image in images:  # before the model is read for them
        load_image(image, honour_exif=False)

    from internvl_jax.inference.chat import AnswerError
    from internvl_jax.inference.loading import load
    from internvl_jax.parallel.distributed import several

    generation = options.generation(args)
    _join(args)
    if prompt is None and several():
        raise ValueError("a session takes one process: give a PROMPT, which all of them then read")
    with progress_bar() as progress:
        chat = load(
            args.checkpoint,
            mesh=args.mesh,
            dtype=args.dtype,
            quantize=args.quantize,
            cache_dtype=args.cache_dtype,
            adapters=args.adapters,
            template=args.template,
            progress=progress,
        )
    chat.check_ready()
    settings = {"system": args.system, "honour_exif": not args.ignore_exif, **generation}
    if prompt is None:
        return _session(chat, images, settings)
    try:
        if args.json:
            with status("answering"):
                reply = chat.chat(prompt, images=images, **settings)
            print_json(reply.to_dict())
            return 0
        reply = _answer(chat, prompt, images, [], settings)
    except AnswerError as error:
        entry.fail(str(error))
        return 1
    if reply.finish_reason == "length":
        err.print(f"(cut off after {len(reply.tokens)} tokens: --max-new-tokens allows more)", style="dim")
    return 0


def _prompt(words: list[str]) -> str | None:
    """The question, None for a session. What is given beside it, or is an image's name, was meant for an option."""
    if not words:
        return None
    images = [word for word in words if _names_an_image(word)]
    if images:
        raise ValueError(
            f"{images[0]} is an image, not a question: write --image before each image "
            f"({' '.join(f'--image {name}' for name in images[:3])})"
        )
    if len(words) > 1:
        raise ValueError(f"one PROMPT is asked, not {len(words)} ({', '.join(map(repr, words[:5]))}): put it in quotes")
    prompt = _stdin(sys.stdin.read).strip() if words[0] == "-" else words[0]
    if not prompt.strip():
        raise ValueError("the prompt is empty: ask a question, or leave PROMPT out to start a session")
    return prompt


def _names_an_image(word: str) -> bool:
    if len(word.split()) == 1 and Path(word).suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        if not files.resolve(word).is_file():
            return False
        load_image(word, honour_exif=False)
        return True
    except (ValueError, OSError):
        return False


def _answer(
    chat: Any, question: str, images: list[Path | bytes], history: list[tuple[str, str]], options: dict[str, Any]
) -> Any:
    """Print an answer, piece by piece where it can be streamed; returns the whole Reply."""
    with status("answering") as waiting:
        if options.get("num_beams", 1) > 1:  # beams decide at the end
            reply = chat.chat(question, images, history, **options)
            waiting.stop()
            print(reply.text, flush=True)
            return reply
        stream = chat.stream(question, images, history, **options)
        shown = False
        try:
            for piece in stream:
                waiting.stop()
                shown = True
                print(piece, end="", flush=True)
        except ValueError:
            if shown:
                print(flush=True)
            raise
    print(flush=True)
    return stream.reply


def _session(chat: Any, images: list[Path | bytes], options: dict[str, Any]) -> int:
    """Ask, answer, ask again, until end of input. Exit code 1: a script's input brought errors and no answer."""
    try:
        import readline  # noqa: F401  (line editing for input(); absent on some systems)
    except ImportError:
        pass
    if sys.stdin.isatty():
        err.print(f"{chat.name}: type a question. /image FILE shows a picture, /help tells more.")
    history: list[tuple[str, str]] = []
    answered = failed = 0

    def left() -> int:
        return 1 if failed and not answered and not sys.stdin.isatty() else 0

    while True:
        try:
            line = _ask(f"[{len(images)} image(s)] > " if images else "> ").strip()
        except EOFError:
            return left()
        except entry.Terminated:
            raise
        except KeyboardInterrupt:
            err.print("\n(Ctrl-D or /quit leaves)")
            continue
        if not line:
            continue
        command, _, argument = line.partition(" ")
        try:
            if command in ("/quit", "/exit"):
                return left()
            elif command == "/help":
                err.print(INTERACTIVE_HELP)
            elif command == "/clear":
                images, history = [], []
            elif command == "/image":
                images = [*images, _picture(argument)]  # it goes with the next question
            elif command.startswith("/"):
                err.print(f"{command} is no command here; there are:\n{INTERACTIVE_HELP}")
            else:
                history = _answer(chat, line, images, history, options).history
                answered += 1
        except entry.Terminated:
            raise
        except KeyboardInterrupt:
            print(flush=True)
            err.print("(stopped; this answer is not remembered)")
        except ValueError as error:
            failed += 1
            entry.fail(str(error))


def _picture(argument: str) -> Path | bytes:
    """The image that /image names, once it has been seen to be one: the file, or what a pipe gives."""
    name = argument.strip().strip("'\"")
    if not name:
        raise ValueError("/image needs a file: /image photo.jpg")
    image = read_once(Path(name).expanduser())
    load_image(image, honour_exif=False)
    return image


def _ask(prompt: str) -> str:
    if not sys.stdin.isatty():
        line = _stdin(sys.stdin.readline)
        if not line:
            raise EOFError
        return line
    if sys.stdout.isatty():
        return input(prompt)
    # input() would write its prompt to stdout, which is for answers.
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


def _stdin(read: Callable[[], str]) -> str:
    try:
        return read()
    except OSError as error:  # closed by the shell, `<&-`
        raise ValueError(f"standard input cannot be read ({error.strerror}): give the question as PROMPT") from None


def _convert(args: argparse.Namespace) -> int:
    from checkpoints_convert.convert import convert
    from internvl_jax.quantize import QuantizeError, Scheme

    if args.force_int4_vision and args.quantize != "int4":
        raise QuantizeError("--force-int4-vision goes with --quantize int4")
    scheme = args.quantize and Scheme(args.quantize, args.force_int4_vision)
    with progress_bar() as progress:
        report = convert(args.src, args.dst, quantize=scheme, vision_tower=args.vision_tower, progress=progress)
    err.print(report.summary())
    return 0


def _export(args: argparse.Namespace) -> int:
    from checkpoints_convert.export import export

    with progress_bar() as progress:
        report = export(args.src, args.dst, safe_serialization=args.safetensors or None, progress=progress)
    err.print(report.summary())
    return 0


def _verify(args: argparse.Namespace) -> int:
    from internvl_jax import checkpoint

    with progress_bar() as progress:
        size, summed = checkpoint.verify(args.directory, progress=progress)
    checked = "sizes, checksums and numbers checked" if summed else "sizes and numbers checked; it has no checksums"
    err.print(f"{args.directory}: {size / 1e9:.2f} GB, {checked}")
    return 0


def _parity(args: argparse.Namespace) -> int:
    from checkpoints_convert.parity import run_parity

    with progress_bar() as progress:
        report = run_parity(
            args.checkpoint,
            image=args.image,
            prompt=args.prompt,
            reference=args.reference,
            vision_tower=args.vision_tower,
            progress=progress,
        )
    if args.json:
        print_json(report.to_dict())
    else:
        report.print(Console(highlight=False))
    return 0 if report.passed else 1


def _compile_report(args: argparse.Namespace) -> int:
    names = ("preset", "topology", "batch", "length", "prompt", "vision", "dtype", "quantize", "cache_dtype")
    asked = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if (args.plan or args.table) and args.mesh:
        raise ValueError("--plan and --table choose the mesh: leave --mesh out, or both of them")
    if not args.table and not args.topology:
        raise ValueError("name the slice: --topology v5e-8 for example")

    if args.program == "train":
        return _train_report(args)
    for name in ("recipe", "images", "remat", "param_dtype"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} belongs to --program train")
    from internvl_jax.aot import compile_report, planner

    if args.table:
        slices = args.topology.split(",") if args.topology else planner.SLICES
        for line in planner.table(asked, slices, say=err.print):
            print(line, flush=True)
    elif args.plan:
        made = planner.plan(asked, say=err.print)
        _show(made, args.json, planner.lines)
    else:
        report = compile_report.report(compile_report.make_workload(**asked, mesh=args.mesh), args.program)
        _show(report, args.json, compile_report.lines)
    return 0


def _show(report: Any, as_json: bool, lines: Callable[[Any], list[str]]) -> None:
    if as_json:
        print_json(report.to_dict())
    else:
        print("\n".join(lines(report)))


def _train_report(args: argparse.Namespace) -> int:
    from internvl_jax.aot import train_report

    for name in ("prompt", "quantize", "cache_dtype"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} does not apply to --program train")
    chosen = ("batch", "remat", "param_dtype")
    names = ("preset", "topology", "recipe", "mesh", "length", "images", "vision", "dtype", *chosen)
    asked = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if (args.plan or args.table) and any(name in asked for name in chosen):
        raise ValueError("--plan and --table choose --batch, --remat and --param-dtype: leave them out")
    if args.table:
        slices = asked.pop("topology", ",".join(train_report.SLICES)).split(",")
        recipes = asked.pop("recipe", ",".join(train_report.RECIPES)).split(",")
        for line in train_report.table(asked, slices, recipes, say=err.print):
            print(line, flush=True)
        return 0
    done = (
        train_report.plan(asked, say=err.print) if args.plan else train_report.report(train_report.make_work(**asked))
    )
    if done is None:
        print("nothing fits: take a larger slice, shorter rows or adapters (--recipe lora)")
        return 0
    _show(done, args.json, train_report.lines)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from internvl_jax.inference import bench

    _join(args)
    with counting() as progress:
        result = bench.run(
            checkpoint=args.checkpoint,
            preset=None if args.checkpoint else args.preset,
            mesh=args.mesh,
            dtype=args.dtype,
            quantize=args.quantize,
            cache_dtype=args.cache_dtype,
            batches=args.batch,
            prompt_tokens=args.prompt_tokens,
            profile=args.profile,
            progress=progress,
        )
    _show(result, args.json, bench.lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
