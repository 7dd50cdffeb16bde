"""Fine-tune with LoRA, and ask the model with its adapters (extra `train`).

python examples/lora_finetuning.py                      # nano learns a new question
python examples/lora_finetuning.py --checkpoint InternVL-Chat-V1-1-jax --data meta.json --output runs/lora \\
    --mesh fsdp=8 --image photo.jpg --question "What is shown?"
"""

import argparse
import tempfile
from pathlib import Path

import internvl_jax
from internvl_jax.nano import lesson
from internvl_jax.training.recipes import override, recipe_of
from internvl_jax.training.runs.prepare import RunOptions, prepare
from internvl_jax.training.runs.run import start
from internvl_jax.training.runs.summary import summarize, summarize_result

WORD = Path(internvl_jax.__file__).parent / "nano" / "images" / "word.png"
NANO_NUMBERS = {"optimizer": {"learning_rate": 3e-3}, "global_batch_size": 4}  # nano is small, and the run short

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", type=Path, help="converted directory (default: nano)")
parser.add_argument("--data", type=Path, help="meta file, JSONL or LLaVA's JSON (default: a small data set for nano)")
parser.add_argument("--output", type=Path, help="directory of the run, new or to resume (default: a temporary one)")
parser.add_argument("--steps", type=int, help="optimizer steps (default: 32 for nano, else one epoch)")
parser.add_argument("--mesh", help="for example fsdp=8 (default: one device)")
parser.add_argument("--image", default=WORD)
parser.add_argument("--question", default="What kind of picture is this?")
args = parser.parse_args()

with tempfile.TemporaryDirectory() as temporary:
    data, recipe, steps = args.data, recipe_of("lora"), args.steps
    if data is None:
        lesson.write(Path(temporary) / "lesson", samples=400, heldout=20)
        data = Path(temporary) / "lesson" / "meta.json"
    if args.checkpoint is None:
        recipe, steps = override(recipe, **NANO_NUMBERS), steps or 32
    output = args.output or Path(temporary) / "run"
    remat = "none" if args.checkpoint is None else "full"  # nano's activations fit in memory
    options = RunOptions(recipe, data, output, args.checkpoint, steps=steps, mesh=args.mesh, remat=remat)
    run = prepare(options)
    print(*summarize(run), sep="\n")

    def log(metrics):
        if metrics["step"] % 8 == 0:
            print(f"step {metrics['step']}: loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s")

    outcome = start(run, log=log)
    print(*summarize_result(run, outcome), sep="\n")
    if outcome.finished:
        chat = internvl_jax.load(args.checkpoint, mesh=args.mesh, adapters=run.output / "model")
        print(args.question, chat.chat(args.question, images=[args.image]).text)
