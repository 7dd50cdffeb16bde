"""Ask questions about an image, with history and streaming.

python examples/chat.py                                                    # nano, the small model in the package
python examples/chat.py --checkpoint InternVL-Chat-V1-1-jax --image photo.jpg "What is shown?" "Where was it taken?"
"""

import argparse
from pathlib import Path

import internvl_jax

SHAPES = Path(internvl_jax.__file__).parent / "nano" / "images" / "shapes.png"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("questions", nargs="*", default=["How many shapes are there?", "Is there a circle?"])
parser.add_argument("--checkpoint", help="converted or published directory (default: nano)")
parser.add_argument("--image", default=SHAPES)
parser.add_argument("--mesh", help="for example tensor=8")
args = parser.parse_args()

chat = internvl_jax.load(args.checkpoint, mesh=args.mesh)
history = []
for question in args.questions:
    stream = chat.stream(question, images=[args.image], history=history)
    print(f"{question} ", end="")
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    history = stream.reply.history
