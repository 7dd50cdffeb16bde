"""Answer many questions at once on a mesh.

python examples/batch_inference.py
python examples/batch_inference.py --checkpoint InternVL-Chat-V1-1-jax --mesh data=2,tensor=4
"""

import argparse
import time
from pathlib import Path

import internvl_jax

IMAGES = Path(internvl_jax.__file__).parent / "nano" / "images"
QUESTIONS = {
    "shapes.png": ["How many shapes are there?", "Is there a circle?"],
    "word.png": ["What word is written here?"],
    "digits.png": ["What number is written here?"],
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", help="converted or published directory (default: nano)")
parser.add_argument("--mesh", help="for example data=2,tensor=4 (default: one device)")
args = parser.parse_args()

rows = [(question, IMAGES / name) for name, questions in QUESTIONS.items() for question in questions]
chat = internvl_jax.load(args.checkpoint, mesh=args.mesh)
for run in ("first call, which compiles", "second call"):
    start = time.perf_counter()
    replies = chat.batch_chat([question for question, _ in rows], [[image] for _, image in rows], max_new_tokens=16)
    print(f"{run}: {len(rows)} answers in {time.perf_counter() - start:.2f} s")
for (question, image), reply in zip(rows, replies, strict=True):
    print(f"{image.name}: {question} {reply.text if reply.error is None else reply.error}")
