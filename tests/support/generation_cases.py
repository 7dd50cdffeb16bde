"""Small random language models, and the beam searches that transformers 4.37 answered.

Run as a program under transformers 4.37.2 and torch, this file writes data/beam_transformers_4_37.json again:
    python tests/support/generation_cases.py
Weights and prompts come from numpy's RandomState, whose streams are frozen, so only the answers are kept.
"""

import json
import random

import numpy as np
from support.paths import DATA

RECORDED = DATA / "beam_transformers_4_37.json"
PROMPT = 9  # tokens of the longest prompt of a beam case
IMAGE = 7  # the token that stands for an image's
NO_END = {"eos_token_ids": ()}

LLAMA = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 640,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 30,
}


def llama_weights(seed, config=None, sharpness=1.0):
    """Parameters of `config` (LLAMA by default) as numpy arrays in models.llama's tree, every one of them random.

    sharpness: factor on the logits; low values make end tokens and close races likely.
    """
    config = config or LLAMA
    rng = np.random.RandomState(seed)
    width, mlp, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    vocabulary, head = config["vocab_size"], width // heads

    def normal(*shape, fan_in, scale=1.5):
        return (rng.standard_normal(shape) * scale / np.sqrt(fan_in)).astype(np.float32)

    def norm(*shape):
        return {"scale": (1 + 0.2 * rng.standard_normal(shape)).astype(np.float32)}

    return {
        "embed_tokens": {"embedding": normal(vocabulary, width, fan_in=1, scale=1.0)},
        "layers": {
            "input_layernorm": norm(layers, width),
            "post_attention_layernorm": norm(layers, width),
            "self_attn": {
                "q_proj": {"kernel": normal(layers, width, heads, head, fan_in=width)},
                "k_proj": {"kernel": normal(layers, width, kv_heads, head, fan_in=width)},
                "v_proj": {"kernel": normal(layers, width, kv_heads, head, fan_in=width)},
                "o_proj": {"kernel": normal(layers, heads, head, width, fan_in=width)},
            },
            "mlp": {
                "gate_proj": {"kernel": normal(layers, width, mlp, fan_in=width)},
                "up_proj": {"kernel": normal(layers, width, mlp, fan_in=width)},
                "down_proj": {"kernel": normal(layers, mlp, width, fan_in=mlp)},
            },
        },
        "norm": norm(width),
        "lm_head": {"kernel": normal(width, vocabulary, fan_in=width, scale=1.5 * sharpness)},
    }


def tokens_of(seed, *lengths):
    """Ragged prompts without image tokens: input_ids and mask, right-padded with a token that must not matter."""
    rng = np.random.RandomState(seed)
    allowed = np.setdiff1d(np.arange(3, LLAMA["vocab_size"]), [IMAGE])
    ids = np.full((len(lengths), max(lengths)), 5)
    mask = np.zeros(ids.shape, int)
    for row, length in enumerate(lengths):
        ids[row, :length] = rng.choice(allowed, length)
        mask[row, :length] = 1
    return ids, mask


def rows_of(ids, mask):
    return [row[keep > 0].tolist() for row, keep in zip(ids, mask)]


def padded(rows, side="left", extra=0):
    width = max(map(len, rows)) + extra
    ids = np.full((len(rows), width), IMAGE)  # the worst token to pad with: it must not count as an image's
    mask = np.zeros(ids.shape, np.int64)
    for number, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    return ids, mask


def torch_llama(params, config=None):
    """transformers' LlamaForCausalLM with these parameters, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    values = dict(config or LLAMA)
    del values["model_type"]
    model = LlamaForCausalLM(LlamaConfig(**values)).eval()
    width = values["hidden_size"]
    state = {
        "model.embed_tokens.weight": params["embed_tokens"]["embedding"],
        "model.norm.weight": params["norm"]["scale"],
        "lm_head.weight": params["lm_head"]["kernel"].T,
    }
    layers = params["layers"]
    for i in range(values["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}{name}.weight"] = layers[name]["scale"][i]
        for name in ("q_proj", "k_proj", "v_proj"):
            state[f"{prefix}self_attn.{name}.weight"] = layers["self_attn"][name]["kernel"][i].reshape(width, -1).T
        state[f"{prefix}self_attn.o_proj.weight"] = layers["self_attn"]["o_proj"]["kernel"][i].reshape(-1, width).T
        for name in ("gate_proj", "up_proj", "down_proj"):
            state[f"{prefix}mlp.{name}.weight"] = layers["mlp"][name]["kernel"][i].T
    state = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if "rotary" not in name]
    return model


def beam_cases():
    """Settings of beam searches: every combination of rules, short answers, many of them ended by an end token."""
    draw = random.Random(4372)
    cases = []
    for number in range(160):
        limit = draw.choice([1, 3, 12, 12, 20])
        cases.append(
            {
                "seed": number,
                "model": draw.randrange(6),
                "rows": draw.choice([1, 3]),
                "num_beams": draw.choice([2, 5]),
                "max_new_tokens": limit,
                "min_new_tokens": draw.choice([0, 0, 0, min(4, limit)]),
                "length_penalty": draw.choice([1.0, 1.0, 0.0, 0.5, 2.0, -1.0]),
                "early_stopping": draw.choice([False, True, "never"]),
                "repetition_penalty": draw.choice([1.0, 1.0, 1.3]),
                "eos_token_ids": draw.choice([[2], [2], [2, 5, 7]]),
            }
        )
    return cases


def beam_model(case):
    """The weights that a case uses."""
    return llama_weights(case["model"], sharpness=(0.5, 1.0)[case["model"] % 2])


def beam_prompt(case):
    """input_ids and attention_mask [rows, PROMPT] int64, ragged and left-padded."""
    rng = np.random.RandomState(1000 + case["seed"])
    ids = np.zeros((case["rows"], PROMPT), np.int64)
    mask = np.zeros_like(ids)
    for row in range(case["rows"]):
        length = PROMPT if row == 0 else rng.randint(2, PROMPT + 1)
        ids[row, PROMPT - length :] = rng.randint(3, LLAMA["vocab_size"], length)
        mask[row, PROMPT - length :] = 1
    return ids, mask


def torch_beams(model, case):
    """transformers' answer to a case, generated from embeddings: rows of token ids with padding.

    The repetition penalty goes by the generated tokens alone, as documented in sampling.penalize: 4.37's bos token in
    front is hidden from it, and so are the masks by which transformers 5 passes over the first tokens of padded rows.
    """
    import torch
    import transformers
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    leading = 1 if transformers.__version__.startswith("4.37.") else 0
    ids, mask = beam_prompt(case)
    options = {name: case[name] for name in ("num_beams", "max_new_tokens", "length_penalty", "early_stopping")}
    if case["min_new_tokens"]:
        options["min_new_tokens"] = case["min_new_tokens"]
    if case["repetition_penalty"] != 1.0:
        penalty = RepetitionPenaltyLogitsProcessor(case["repetition_penalty"])
        options["logits_processor"] = LogitsProcessorList([lambda ids, scores: penalty(ids[:, leading:], scores)])
    with torch.no_grad():
        tokens = model.generate(
            inputs_embeds=model.get_input_embeddings()(torch.from_numpy(ids)),
            attention_mask=torch.from_numpy(mask),
            do_sample=False,
            eos_token_id=case["eos_token_ids"],
            pad_token_id=0,
            **options,
        )
    return tokens[:, leading:].tolist()


def answers(tokens, eos_token_ids):
    """Rows cut behind their end token, which is written as the first of eos_token_ids, as 4.37 writes it."""
    rows = []
    for row in tokens:
        ends = [i for i, token in enumerate(row) if token in eos_token_ids]
        rows.append([int(t) for t in row] if not ends else [*map(int, row[: ends[0]]), eos_token_ids[0]])
    return rows


def main():
    import transformers

    if transformers.__version__ != "4.37.2":
        raise SystemExit(f"these answers are transformers 4.37.2's; this is {transformers.__version__}")
    recorded = [
        answers(torch_beams(torch_llama(beam_model(case)), case), case["eos_token_ids"]) for case in beam_cases()
    ]
    RECORDED.write_text("[\n" + ",\n".join(json.dumps(rows) for rows in recorded) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
