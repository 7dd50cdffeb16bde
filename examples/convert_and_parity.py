"""Convert a PyTorch checkpoint and compare every stage with the PyTorch implementation.

python examples/convert_and_parity.py                             # nano, exported to PyTorch first
python examples/convert_and_parity.py --source InternVL-Chat-V1-1 --output InternVL-Chat-V1-1-jax
"""

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

from checkpoints_convert.convert import convert
from checkpoints_convert.export import export
from checkpoints_convert.parity.run import run_parity
from internvl_jax.inference.loading import NANO

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--source", type=Path, help="published PyTorch directory (default: nano)")
parser.add_argument("--output", type=Path, help="directory to write (default: a temporary one)")
args = parser.parse_args()

with tempfile.TemporaryDirectory() as temporary:
    source, output = args.source, args.output or Path(temporary) / "converted"
    if source is None:
        source = Path(temporary) / "pytorch"
        export(NANO, source)
    convert(source, output)
    report = run_parity(output, reference=source)
    report.print(Console())
    print("passed" if report.passed else "FAILED")
