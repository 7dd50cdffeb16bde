"""What quantization costs in quality, measured against the same checkpoint as it was, computed in float32.

    python -m internvl_jax.evaluation.quantize_report [--checkpoint DIR] [--count N] [--new-tokens N] [--json]

The questions and images are those of nano's evaluation (nano/render.py), held out in its training; any other
checkpoint is asked them too. Reported for each variant:

    KL          Kullback-Leibler divergence of the next token, reference to variant, in nats: the prompt is read by
                prefill, the reference's greedy answer through the cache, as decoding would
    next token  how often the likeliest token is the reference's, given the reference's tokens before it
    answer      how many whole greedy answers are the reference's
    right       how many are the expected one, where the checkpoint is nano, which has learnt to answer
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from internvl_jax.inference.chat import Chat, Reply, require_answers
from internvl_jax.inference.generation.bound_model import BoundModel, PromptBatch
from internvl_jax.inference.generation.generate import read_prompt
from internvl_jax.inference.generation.sampling import GenerationConfig
from internvl_jax.inference.loading import load
from internvl_jax.models.layers import Array, part_variables
from internvl_jax.models.llama import Llama
from internvl_jax.nano.render import KINDS, QAPair, heldout_questions
from internvl_jax.quantize import Scheme

LANGUAGES = ("en", "zh")
VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8 weights": {"quantize": "int8"},
    "int8 cache": {"cache_dtype": "int8"},
    "int8 weights and cache": {"quantize": "int8", "cache_dtype": "int8"},
    "int4 weights": {"quantize": "int4"},
    "int4 weights, int8 cache": {"quantize": "int4", "cache_dtype": "int8"},
    "int4 weights, tower too": {"quantize": Scheme("int4", int4_vision=True)},
}


@dataclass(frozen=True)
class Cost:
    """One variant's figures; see the module's docstring."""

    variant: str
    kl_mean: float
    kl_max: float
    next_token: float
    answer: float
    right: float
    tokens: int  # that the first three are means over
    answers: int


@jax.jit
def answer_logits(model: BoundModel, prompt: PromptBatch, answer: Array) -> Array:
    """Logits of given answers after prompts, read through the KV cache.

    Args:
        model: the model.
        prompt: B prompts of T tokens, padded on the left.
        answer: [B,A] int32, tokens of the answers.

    Returns:
        [B,A,V] float32, logits of each answer token given those before it.
    """
    config, dtype = model.config, model.dtype
    first, cache = read_prompt(model, prompt, slots=prompt.input_ids.shape[1] + answer.shape[1])
    given = answer[:, :-1]
    positions = prompt.valid.sum(axis=1, dtype=jnp.int32)[:, None] + jnp.arange(given.shape[1])
    llama, variables = Llama(config.text, dtype), part_variables(model.variables, "language_model")
    x = llama.apply(variables, given, method="embed")
    hidden, _ = llama.apply(variables, x, positions, jnp.ones(given.shape, bool), cache)
    return jnp.concatenate([first[:, None], llama.apply(variables, hidden, method="logits")], axis=1)


def divergence(reference: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of logits [...,V], from reference to ours, in nats. -> [...]."""
    p, q = (np.asarray(jax.nn.log_softmax(jnp.asarray(x, jnp.float32))) for x in (reference, ours))
    return np.sum(np.exp(p) * (p - q), axis=-1)


class Questions:
    """A batch of questions about one image each, with the answers that are expected."""

    def __init__(self, asked: list[tuple[np.ndarray, QAPair]]):
        self.images = [image for image, _ in asked]
        self.texts = [question.text for _, question in asked]
        self.expected = [question.answer for _, question in asked]

    def ask(self, chat: Chat, new_tokens: int) -> list[Reply]:
        """The model's own greedy answers."""
        return list(require_answers(chat.batch_chat(self.texts, self.images, max_new_tokens=new_tokens)))

    def logits(self, chat: Chat, answers: list[Reply]) -> np.ndarray:
        """The model's logits at each token of given answers, one after the other, [sum of their tokens, V]."""
        batch = chat.prompts.build(self.texts, self.images)
        if batch.pixel_values is None:
            raise ValueError("quantization is compared on questions about images")
        gen = GenerationConfig(max_new_tokens=1)
        model = chat.generator
        prompt, _ = model.prepare(batch.input_ids, batch.attention_mask, model.encode(batch.pixel_values), gen)
        width = max(len(reply.tokens) for reply in answers)
        tokens = np.array([reply.tokens + [0] * (width - len(reply.tokens)) for reply in answers], np.int32)
        logits = answer_logits(model.model, prompt, tokens)
        return np.concatenate([row[: len(reply.tokens)] for row, reply in zip(np.asarray(logits), answers)])


def measure(
    checkpoint: Path | None, count: int, new_tokens: int = 16, progress: Callable[[Any], Any] = iter
) -> Iterator[Cost]:
    """The cost of every variant, over `count` questions of each kind and language. progress wraps the batches."""
    batches = [Questions(heldout_questions(kind, language, count)) for kind in KINDS for language in LANGUAGES]

    def run(chat: Chat, given: list[list[Reply]] | None) -> tuple[list[list[Reply]], np.ndarray]:
        replies = [batch.ask(chat, new_tokens) for batch in progress(batches)]
        return replies, np.concatenate([b.logits(chat, answers) for b, answers in zip(batches, given or replies)])

    answers, reference = run(load(checkpoint, dtype="float32"), None)
    for variant, options in {"float32": {}, **VARIANTS}.items():
        replies, logits = run(load(checkpoint, **{"dtype": "float32", **options}), answers)
        kl = divergence(reference, logits)
        pairs = [(a, b, right) for x, y, z in zip(answers, replies, batches) for a, b, right in zip(x, y, z.expected)]
        yield Cost(
            variant=variant,
            kl_mean=float(kl.mean()),
            kl_max=float(kl.max()),
            next_token=float(np.mean(reference.argmax(-1) == logits.argmax(-1))),
            answer=float(np.mean([a.tokens == b.tokens for a, b, _ in pairs])),
            right=float(np.mean([b.text == right for _, b, right in pairs])),
            tokens=len(kl),
            answers=len(pairs),
        )


def print_table(costs: list[Cost], console: Console) -> None:
    """One row per variant."""
    title = f"against float32: {costs[0].answers:,} answers, {costs[0].tokens:,} tokens"
    table = Table(title=title)
    for column in ("variant", "KL mean", "KL max", "same token", "same answer", "correct"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for one in costs:
        shares = (f"{share:.1%}" for share in (one.next_token, one.answer, one.right))
        table.add_row(one.variant, f"{one.kl_mean:.1e}", f"{one.kl_max:.1e}", *shares)
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: nano, the model that ships")
    parser.add_argument("--count", type=int, default=50, metavar="N", help="questions per kind and language (50)")
    parser.add_argument("--new-tokens", type=int, default=16, metavar="N", help="longest answer (16)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.count < 1 or args.new_tokens < 1:
        parser.error("--count and --new-tokens must be at least 1")
    quiet = Console(stderr=True)
    progress = partial(track, description="asking", console=quiet, disable=not quiet.is_terminal)
    costs = list(measure(args.checkpoint, args.count, args.new_tokens, progress))
    if args.json:
        print(json.dumps([asdict(one) for one in costs]))
    else:
        print_table(costs, Console())


if __name__ == "__main__":
    main()
