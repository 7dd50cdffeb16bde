"""LLaMA against transformers' LlamaForCausalLM, at about 500 tokens; the cache, padding and dtypes against itself."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from support import modules
from support.generation_cases import LLAMA, llama_weights
from support.golden import assert_close, kl, spread, torch_tree

from internvl_jax.config import ChatConfig, config_from_hf
from internvl_jax.config.hf_text import read_text
from internvl_jax.models import kv_cache, llama
from internvl_jax.models.layers import positions_from_valid
from internvl_jax.models.stack import unstack
from internvl_jax.parallel.mesh import AXES

TOKENS = 497  # a wrong rotary base hides in short prompts
CONFIG = config_from_hf(LLAMA).text

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
CASES = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped": {"num_key_value_heads": 2, "rms_norm_eps": 1e-3},
    "one kv head, wide heads": {"num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": True},
    "theta": {"rope_theta": 5e5, "attention_bias": True},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "mlp_bias": True},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "dynamic, three times the length": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        "max_position_embeddings": 160,
    },
    "llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3, "num_key_value_heads": 2},
}


def whole(params, config, ids, valid, dtype=jnp.float32, collect=False, positions=None):
    """Logits [B,T,V] of whole sequences, and their hidden states."""
    positions = positions_from_valid(valid) if positions is None else positions
    x = modules.embed(params, ids, dtype)
    hidden, _, out = modules.run_llama(params, config, x, positions, valid, dtype=dtype, collect=collect)
    return modules.logits(params, config, hidden), out


# Compiled once per configuration, options and shapes.
compiled = jax.jit(whole, static_argnames=("config", "dtype", "collect"))


def full(*args, **options):
    return jax.device_get(compiled(*args, **options))


def random_ids(seed, rows, tokens, vocabulary=LLAMA["vocab_size"]):
    return np.random.default_rng(seed).integers(3, vocabulary, (rows, tokens), dtype=np.int32)


def all_valid(ids):
    return np.ones(ids.shape, bool)


@pytest.fixture(scope="module")
def weights():
    return llama_weights(21)


QWEN = {
    "qwen2": {"num_key_value_heads": 2, "rope_theta": 1e6, "rms_norm_eps": 1e-4},
    "qwen2, tied, one kv head": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24, "rope_theta": 1e6, "rms_norm_eps": 1e-3},
    "qwen3, tied": {"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True},
}


def qwen_model(name):
    """transformers' Qwen2 or Qwen3 of LLAMA's size with random, spread-out weights, and ours of the same weights."""
    import transformers

    family = name[:5].title()
    values = {key: value for key, value in LLAMA.items() if key not in ("model_type", "architectures")}
    hf = getattr(transformers, f"{family}Config")(**{**values, "vocab_size": 67, "pad_token_id": None, **QWEN[name]})
    model = spread(getattr(transformers, f"{family}ForCausalLM")(hf), 9)
    text = read_text({**hf.to_dict(), "architectures": [f"{family}ForCausalLM"]}, "config.json")
    config = ChatConfig(vision=None, projector=None, text=text, layout="llama")
    return model, text, torch_tree(config, model)["language_model"]


@pytest.mark.parametrize("name", QWEN)
def test_against_transformers_qwen(name):
    """Biases on q, k and v, or a norm on each head of q and k, and a head_dim of its own."""
    torch = pytest.importorskip("torch")
    model, config, params = qwen_model(name)
    ids = random_ids(1, 1, TOKENS, 67)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long(), output_hidden_states=True)
    logits, out = full(params, config, ids, all_valid(ids), collect=True)
    for layer, expected in enumerate(theirs.hidden_states):
        assert_close(out["hidden_states"][layer], expected.numpy(), 1e-4, f"hidden state {layer}")
    assert 1 < theirs.logits.std() < 20
    assert_close(logits, theirs.logits.numpy(), 2e-4, "logits")


def torch_model(seed=5, **options):
    """transformers' model of LLAMA's size with random, spread-out weights, and ours of the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {name: value for name, value in LLAMA.items() if name != "model_type"}
    hf = LlamaConfig(**{**values, "vocab_size": 67, "pad_token_id": None, **options})
    model = spread(LlamaForCausalLM(hf), seed)
    config = config_from_hf(hf.to_dict())
    return model, config.text, torch_tree(config, model)["language_model"]


@pytest.mark.parametrize("name", CASES)
def test_against_transformers(name):
    torch = pytest.importorskip("torch")
    model, config, params = torch_model(**CASES[name])
    ids = random_ids(1, 1, TOKENS, 67)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long(), output_hidden_states=True)
    logits, out = full(params, config, ids, all_valid(ids), collect=True)
    for layer, expected in enumerate(theirs.hidden_states):
        assert_close(out["hidden_states"][layer], expected.numpy(), 1e-4, f"hidden state {layer}")
    assert 1 < theirs.logits.std() < 20
    assert_close(logits, theirs.logits.numpy(), 2e-4, "logits")
    assert kl(theirs.logits.numpy(), logits).max() < 1e-4
    # The prompt is long enough: a base that is wrong by a hundredth shows.
    wrong = dataclasses.replace(config, rope_theta=1.01 * config.rope_theta)
    assert np.abs(full(params, wrong, ids, all_valid(ids), collect=True)[0] - logits).max() > 1e-2


@pytest.mark.parametrize("name", ["linear", "llama3"])
def test_rope_frequencies_against_transformers(name):
    """The frequencies themselves, at the published size of a head."""
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf = LlamaConfig(hidden_size=256, num_attention_heads=2, **CASES[name])
    theirs = LlamaRotaryEmbedding(hf).inv_freq.numpy()
    ours = llama.rope_frequencies(config_from_hf(hf.to_dict()).text)
    assert ours.dtype == np.float32
    assert np.abs(ours / theirs - 1).max() < 1e-6


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "tuple"])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "through the cache"])
def test_cache_equals_the_whole_sequence(weights, stacked, fresh):
    """Prefill of two ragged rows, then one token after the other, then a few at once; slots to spare."""
    ids = random_ids(2, 2, 40)
    valid = all_valid(ids)
    valid[1, :5] = False
    expected, _ = full(weights, CONFIG, ids, valid)
    params = weights if stacked else {**weights, "layers": unstack(weights["layers"])}
    positions = np.asarray(positions_from_valid(valid))

    @partial(jax.jit, static_argnames="fresh")
    def read(params, cache, ids, positions, valid, fresh):
        x = modules.embed(params, ids, jnp.float32)
        hidden, cache, _ = modules.run_llama(params, CONFIG, x, positions, valid, cache, fresh=fresh)
        return modules.logits(params, CONFIG, hidden), cache

    cache = kv_cache.init_cache(CONFIG, 2, 48, jnp.float32, layers=params["layers"])
    start = 0
    for step in (27, 1, 1, 1, 1, 1, 1, 7):
        now = slice(start, start + step)
        logits, cache = read(params, cache, ids[:, now], positions[:, now], valid[:, now], fresh and start == 0)
        logits = np.asarray(logits)
        for row, first in ((0, 0), (1, 5)):
            begin = max(first - start, 0)
            assert_close(logits[row, begin:], expected[row, now][begin:], 1e-5, f"row {row} from token {start}")
        start += step
        assert int(cache.length) == start
    assert np.array_equal(cache.valid, np.pad(valid, ((0, 0), (0, 8))))


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_does_not_matter(weights, side):
    """0, 7 or 100 pads, whatever stands under them: the same logits."""
    ids = random_ids(3, 1, 30)
    expected, _ = full(weights, CONFIG, ids, all_valid(ids))
    for pads in (0, 7, 100):
        left = {"left": pads, "right": 0, "both": pads // 2}[side]
        padded = np.pad(ids, ((0, 0), (left, pads - left)), constant_values=5)
        valid = np.zeros(padded.shape, bool)
        valid[:, left : left + 30] = True
        logits, _ = full(weights, CONFIG, padded, valid)
        assert_close(logits[:, left : left + 30], expected, 1e-5, f"{pads} pads")
        assert np.all(np.isfinite(logits))


def test_only_earlier_tokens_matter(weights):
    ids = random_ids(4, 1, 30)
    other = ids.copy()
    other[0, 20] = 3 + (ids[0, 20] - 2) % 20
    first, second = (full(weights, CONFIG, x, all_valid(x))[0][0] for x in (ids, other))
    assert np.array_equal(first[:20], second[:20])
    assert np.abs(first[20:] - second[20:]).max(axis=-1).min() > 1e-4


def test_rotary_positions_are_relative(weights):
    """Positions moved by any whole number give the same logits: only distances count."""
    ids = random_ids(5, 1, 30)
    expected, _ = full(weights, CONFIG, ids, all_valid(ids))
    moved, _ = full(weights, CONFIG, ids, all_valid(ids), positions=np.arange(30, dtype=np.int32)[None] + 100)
    assert_close(moved, expected, 1e-4, "positions moved by 100")


def test_bfloat16_against_transformers():
    """KL from transformers' float32 of at most 1e-2 at every position, and the same greedy tokens."""
    torch = pytest.importorskip("torch")
    model, config, params = torch_model(seed=9, num_key_value_heads=2)
    ids, prompt = random_ids(6, 1, 100, 67), random_ids(158, 1, 12, 67)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long()).logits.numpy()
        greedy = model.generate(
            torch.from_numpy(prompt).long(), max_new_tokens=16, do_sample=False, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    second, first = np.sort(torch.stack(greedy.logits).numpy(), axis=-1)[..., -2:].T
    assert (first - second).min() > 0.2  # of random prompts, one whose answer hangs on no close call
    logits, _ = full(params, config, ids, all_valid(ids), dtype=jnp.bfloat16)
    assert logits.dtype == jnp.float32
    divergence = kl(theirs, logits)
    assert divergence.max() < 1e-2, f"largest KL {divergence.max():.3g} at {divergence.argmax()}"
    tokens = np.zeros((1, 28), np.int32)
    tokens[:, :12] = prompt
    valid = np.zeros(tokens.shape, bool)
    for end in range(12, 28):
        valid[:, :end] = True
        logits, _ = full(params, config, tokens, valid, dtype=jnp.bfloat16)
        tokens[0, end] = np.argmax(logits[0, end - 1])
    assert tokens.tolist() == greedy.sequences.tolist()


def test_stored_dtype_and_compute_dtype(weights):
    """Parameters are cast where they are used: what they are stored in says only how exact they are."""
    ids = random_ids(7, 1, 20)
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    widened = jax.tree.map(lambda x: x.astype(np.float32), stored)
    low, wide = (full(tree, CONFIG, ids, all_valid(ids))[0] for tree in (stored, widened))
    assert_close(low, wide, 1e-5, "stored in bfloat16, computed in float32")
    assert np.abs(low - full(weights, CONFIG, ids, all_valid(ids))[0]).max() > 1e-3
    half = [full(tree, CONFIG, ids, all_valid(ids), dtype=jnp.bfloat16)[0] for tree in (stored, widened)]
    assert_close(half[0], half[1], 1e-6, "stored in float32, computed in bfloat16")


def test_rows_added_to_the_vocabulary_are_never_likely(weights):
    """A table padded for a mesh: the added rows' logits are the mask's, the others do not change."""
    ids = random_ids(8, 1, 20)
    expected, _ = full(weights, CONFIG, ids, all_valid(ids))
    padded = {
        **weights,
        "embed_tokens": {"embedding": np.pad(weights["embed_tokens"]["embedding"], ((0, 9), (0, 0)))},
        "lm_head": {"kernel": np.pad(weights["lm_head"]["kernel"], ((0, 0), (0, 9)), constant_values=50.0)},
    }
    logits, _ = full(padded, CONFIG, ids, all_valid(ids))
    assert logits.shape[-1] == expected.shape[-1] + 9
    assert_close(logits[..., :-9], expected, 1e-6, "true rows")
    assert logits[..., -9:].max() < -1e38


@pytest.mark.parametrize(
    ("tensor", "tokens", "products"),
    [
        (1, 8, 9),  # q, k, v, scores, values, o, gate, up, down
        (2, 8, 6),  # q, k and v as one, gate and up as one
        (2, 7, 9),  # tokens that tensor does not divide are whole on each device
        (4, 8, 8),  # so are 2 kv heads
        (2, 1, 9),  # decoding
    ],
)
def test_layers_share_a_product_where_tokens_are_sharded(tensor, tokens, products):
    config = dataclasses.replace(CONFIG, num_key_value_heads=2, num_attention_heads=4)
    params = jax.eval_shape(lambda: modules.init_llama(jax.random.key(0), config))
    x, positions = jnp.zeros((2, tokens, config.hidden_size)), jnp.zeros((2, tokens), jnp.int32)
    run = partial(modules.run_llama, config=config, x=x, positions=positions, valid=positions == 0)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1, 1, tensor), AXES, axis_types=(AxisType.Auto,) * 3)):
        program = str(jax.make_jaxpr(lambda params: run(params))(params))
    assert program.count("dot_general[") == products
