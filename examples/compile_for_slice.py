"""Compile the inference programs for a TPU slice, without a TPU, and print what they need (extra `tpu`).

python examples/compile_for_slice.py                                         # nano on one host of v5e
python examples/compile_for_slice.py --preset internvl_chat_v1_1 --topology v5e-8 --batch-size 8 --max-seq-length 2048
"""

import argparse

from internvl_jax.aot.compile_report import make_report
from internvl_jax.aot.workload import WorkloadRequest, make_workload

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--preset", default="nano")
parser.add_argument("--topology", default="v5e-4")
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--max-seq-length", type=int, default=256)
args = parser.parse_args()

workload = make_workload(WorkloadRequest(args.topology, args.preset, batch=args.batch_size, length=args.max_seq_length))
for program in ("encode", "prefill", "decode"):
    result = make_report(workload, program).to_dict()
    memory = {name: size for name, size in result["hbm_bytes"].items() if size is not None}
    print(f"{program}: peak {memory['peak'] / 2**20:.1f} MiB per chip, {result['flops_per_chip']:.3g} FLOPs per chip,")
    print(f"    mesh {result['mesh']}, {len(result['collectives'])} kinds of collectives")
