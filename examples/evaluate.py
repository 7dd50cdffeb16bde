"""Run a benchmark from its official files and print the report.

python examples/evaluate.py                                       # nano, on a small synthetic POPE
python examples/evaluate.py --checkpoint InternVL-Chat-V1-1-jax --benchmark pope --data data/pope --output runs/pope
"""

import argparse
import tempfile
from pathlib import Path

import internvl_jax
from internvl_jax.evaluation.answering import answer_benchmark, pending_job
from internvl_jax.evaluation.benchmark_run import EvaluationOptions, RunInputs, prepare_run
from internvl_jax.evaluation.datasets import tiny

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", help="converted or published directory (default: nano)")
parser.add_argument("--benchmark", default="pope")
parser.add_argument("--data", type=Path, help="directory of the benchmark's files (default: synthetic ones)")
parser.add_argument("--output", type=Path, help="directory of the run (default: a temporary one)")
parser.add_argument("--limit", type=int, default=24, help="number of questions (default: 24)")
parser.add_argument("--mesh", help="for example tensor=8")
args = parser.parse_args()

with tempfile.TemporaryDirectory() as temporary:
    data, output = args.data or Path(temporary) / "data", args.output or Path(temporary) / "run"
    if args.data is None:
        tiny.write(data, count=args.limit)
    inputs = RunInputs(args.benchmark, "internvl", data, output, model=args.checkpoint or "nano")
    run = prepare_run(inputs, EvaluationOptions(limit=args.limit))
    job = pending_job(run, args.mesh)
    chat = internvl_jax.load(args.checkpoint, mesh=job.mesh)
    answer_benchmark(chat, run, job, batch_size=8)
    print((output / "report.md").read_text(encoding="utf-8"))
