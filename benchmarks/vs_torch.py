"""Inference speed beside PyTorch: the same weights and inputs through transformers and this project, in one run.

    python benchmarks/vs_torch.py [--dtype float32 bfloat16] [--runs 5] [--json]

Builds a model of 249M parameters in transformers' InternVL layout with random weights, saves it, and loads the saved
files here. Outputs are compared first; then image encoding, prefill (with the first token) and decode are timed,
alternating between the two implementations. PyTorch runs eagerly with its default attention (sdpa) in inference_mode,
with a decode loop written by hand, because generate() adds overhead of its own. Ours are the programs that
`internvl_jax.load(...)` runs. The ratio is PyTorch's time over ours: above 1, ours is faster.

"possible" is the ratio of a program that takes only the time of its matrix products, at the best rate that either
library reaches on a large product on this machine; nothing with the same products can be faster. Decode is bound by
memory bandwidth, so it has no such figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

import internvl_jax
from internvl_jax.inference.generation.generator import Generator
from internvl_jax.inference.generation.sampling import GenerationConfig
from internvl_jax.utils import formats

IMAGES, PROMPT, NEW_TOKENS = 2, 512, 64
WORK = {"encode": (IMAGES, "images/s"), "prefill": (PROMPT, "tokens/s"), "decode": (NEW_TOKENS, "tokens/s")}
PAUSE = 0.5  # seconds before a measurement: the other library's idle threads keep spinning for a while
IMAGE_TOKEN = 5


def build(seed: int) -> torch.nn.Module:
    """Build an InternVL with random weights: a ViT of 25M parameters at 448 px (1025 tokens) and a LLaMA of 211M."""
    torch.manual_seed(seed)
    text = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = transformers.InternVLVisionConfig(
        hidden_size=640,
        intermediate_size=2560,
        num_hidden_layers=5,
        num_attention_heads=5,
        norm_type="rms_norm",
        use_qk_norm=True,
    )
    config = transformers.InternVLConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )
    return transformers.InternVLForConditionalGeneration(config).eval()


def matmul_flops(model: torch.nn.Module) -> dict[str, float]:
    """Count the FLOPs of the matrix products of encode and prefill, of attention the causal half."""
    vision, text = model.config.vision_config, model.config.text_config

    def layers(config: Any, rows: int, mlps: int, scores: float) -> float:
        width, layers = config.hidden_size, config.num_hidden_layers
        weights = 4 * width**2 + mlps * width * config.intermediate_size
        return layers * 2 * (rows * weights + 2 * scores * width)

    patches = (vision.image_size[0] // vision.patch_size[0]) ** 2
    tokens = patches + 1
    tower = layers(vision, IMAGES * tokens, 2, IMAGES * tokens**2)
    patch = 2 * IMAGES * patches * 3 * vision.patch_size[0] ** 2 * vision.hidden_size
    folded = 4 * vision.hidden_size
    projector = 2 * IMAGES * patches // 4 * (folded + text.hidden_size) * text.hidden_size
    head = 2 * text.hidden_size * text.vocab_size
    return {"encode": tower + patch + projector, "prefill": layers(text, PROMPT, 3, PROMPT**2 / 2) + head}


def matmul_rate(dtype: str, runs: int) -> float:
    """Measure the faster library on [2048,1024] x [1024,4096], in FLOP/s."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((2048, 1024), (1024, 4096)))
    x, w = (jax.numpy.asarray(m, dtype) for m in (a, b))
    tx, tw = (torch.from_numpy(m).to(getattr(torch, dtype)) for m in (a, b.T.copy()))
    product = jax.jit(lambda x, w: jax.numpy.matmul(x, w, precision="highest"))
    best = float("inf")
    for _ in range(runs + 1):
        best = min(best, timed(lambda: jax.block_until_ready(product(x, w))))
        best = min(best, timed(lambda: torch.nn.functional.linear(tx, tw)))
    return 2 * a.size * b.shape[1] / best


def timed(run: Callable[[], Any]) -> float:
    """Seconds that `run` takes."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class TorchStages:
    """The stages of transformers' model on fixed inputs."""

    def __init__(self, model: torch.nn.Module, pixels: np.ndarray, ids: np.ndarray):
        self.model = model
        self.pixels = torch.from_numpy(pixels).to(model.dtype)
        self.ids = torch.from_numpy(ids).long()

    def encode(self) -> torch.Tensor:
        features = self.model.get_image_features(pixel_values=self.pixels)
        return getattr(features, "pooler_output", features)

    def prefill(self) -> tuple[Any, Any]:
        """The first token and the KV cache."""
        out = self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1), out.past_key_values

    def decode(self, token: Any, cache: Any) -> list[int]:
        """The tokens after `token`."""
        tokens = []
        for _ in range(NEW_TOKENS):
            out = self.model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            tokens.append(int(token))
        return tokens


class OurStages:
    """The stages of this project's model on the same inputs."""

    # With min_new_tokens no token ends the answer, so both sides decode NEW_TOKENS tokens.
    SETTINGS = GenerationConfig(max_new_tokens=NEW_TOKENS + 1, min_new_tokens=NEW_TOKENS + 1)

    def __init__(self, generator: Generator, pixels: np.ndarray, ids: np.ndarray):
        self.generator, self.pixels, self.ids = generator, pixels, ids

    def encode(self) -> jax.Array:
        return jax.block_until_ready(self.generator.encode(self.pixels))

    def prefill(self) -> Any:
        return jax.block_until_ready(self.generator.prefill(self.ids, None, None, self.SETTINGS))

    def decode(self, state: Any) -> Any:
        return jax.block_until_ready(self.generator.decode(state, NEW_TOKENS))


def compare(model: torch.nn.Module, directory: Path, dtype: str, runs: int) -> list[dict[str, Any]]:
    """Time every stage in both implementations, alternating; returns one dict per stage."""
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((IMAGES, 3, 448, 448), dtype=np.float32)
    ids = rng.integers(10, 32000, (1, PROMPT)).astype(np.int32)
    generator = internvl_jax.load(directory, dtype=dtype).generator
    theirs, ours = TorchStages(model.to(getattr(torch, dtype)), pixels, ids), OurStages(generator, pixels, ids)
    times: dict[str, tuple[list[float], list[float]]] = {stage: ([], []) for stage in WORK}
    with torch.inference_mode():
        difference = np.abs(theirs.encode().float().numpy() - np.asarray(ours.encode(), np.float32)).max()
        first, cache = theirs.prefill()
        pairs = zip([int(first), *theirs.decode(first, cache)], generator.read(ours.decode(ours.prefill()))[0][0])
        equal_tokens = next((number for number, (a, b) in enumerate(pairs) if a != b), NEW_TOKENS + 1)
        for run in range(1, runs + 1):
            print(f"{dtype}: run {run} of {runs}", file=sys.stderr, flush=True)
            times["encode"][0].append(timed(theirs.encode))
            times["encode"][1].append(timed(ours.encode))
            times["prefill"][0].append(timed(theirs.prefill))
            times["decode"][0].append(timed(partial(theirs.decode, *theirs.prefill())))
            times["prefill"][1].append(timed(ours.prefill))
            times["decode"][1].append(timed(partial(ours.decode, ours.prefill())))
        rate = matmul_rate(dtype, runs)
    flops = matmul_flops(model)
    return [
        {
            "dtype": dtype,
            **stage_result(stage, *seconds, flops[stage] / rate if stage in flops else None),
            "matmul_gflops": rate / 1e9,
            "max_feature_difference": float(difference),
            "equal_greedy_tokens": equal_tokens,
        }
        for stage, seconds in times.items()
    ]


def stage_result(stage: str, theirs: list[float], ours: list[float], floor: float | None) -> dict[str, Any]:
    """The rates of a stage, from the seconds of each run; `floor`: the seconds of its matrix products alone."""
    amount, unit = WORK[stage]
    a, b = statistics.median(theirs), statistics.median(ours)
    return {
        "stage": stage,
        "unit": unit,
        "torch": amount / a,
        "ours": amount / b,
        "ratio": a / b,
        "possible": None if floor is None else a / floor,
        "torch_seconds": theirs,
        "our_seconds": ours,
    }


def main() -> None:
    """Parse arguments, run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    print("building and saving the model", file=sys.stderr, flush=True)
    model = build(seed=0)
    parameters = sum(p.numel() for p in model.parameters())
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        for dtype in args.dtype:
            rows += compare(model, Path(directory), dtype, args.runs)
    machine = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "transformers": transformers.__version__,
        "jax": jax.__version__,
        "parameters": parameters,
    }
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows}))
        return
    size = formats.parameters(parameters)
    table = Table(title=f"{size} parameters, {machine['cores']} cores, {machine['processor']}")
    for column in ("dtype", "stage", "torch", "ours", "ratio", "possible", "equal tokens"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["dtype"],
            f"{row['stage']}, {row['unit']}",
            *(formats.number(row[column]) if row[column] else "" for column in ("torch", "ours", "ratio", "possible")),
            f"{row['equal_greedy_tokens']}/{NEW_TOKENS + 1}",
        )
    Console(width=100).print(table)
    best = {row["dtype"]: formats.number(row["matmul_gflops"]) for row in rows}
    rates = ", ".join(f"{dtype} {rate} GFLOP/s" for dtype, rate in best.items())
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, jax {jax.__version__}; median of runs")
    print(f"best rate of a large matrix product, either library: {rates}")


def processor_name() -> str:
    """The processor of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
