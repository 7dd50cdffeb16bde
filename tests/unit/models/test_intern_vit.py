"""InternViT against the golden bundle and transformers' InternVLVisionModel; drop path, depth, dtypes, positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import modules
from support.golden import (
    DATA,
    assert_close,
    bundle,
    leaf,
    random_tree,
    read_safetensors,
    spread,
    torch_tree,
    tree_of,
)

from internvl_jax.config import VisionConfig, config_from_hf, load_config
from internvl_jax.models import intern_vit
from internvl_jax.models.stack import is_stacked, unstack

BUNDLE = DATA / "intern_vit"
INTERPOLATED = ["interp_up_168", "interp_down_70", "interp_rect_84x140", "interp_remainder_177"]


@pytest.fixture(scope="module")
def golden():
    config = load_config(BUNDLE / "checkpoint_safetensors")
    params = tree_of(config, read_safetensors(BUNDLE / "checkpoint_safetensors"))["vision_model"]
    return config.vision, params, *bundle("intern_vit")


# Compiled once per configuration, options and shapes, whichever test comes first.
compiled = jax.jit(modules.run_tower, static_argnames=("config", "num_layers", "dtype", "collect"))


def run(*args, **options):
    return jax.device_get(compiled(*args, **options))


def tiny(layers=3, **changes):
    """A tower of 16 x 16 pixels with an odd head count and random parameters, spread out."""
    config = VisionConfig(
        **{
            "hidden_size": 24,
            "num_hidden_layers": layers,
            "num_attention_heads": 3,
            "intermediate_size": 40,
            "image_size": 16,
            "patch_size": 4,
            **changes,
        }
    )
    return config, random_tree(jax.eval_shape(lambda key: modules.init_tower(key, config), jax.random.key(0)))


def pixels(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Against the golden bundle.


def test_golden_hidden_states(golden):
    config, params, arrays, _ = golden
    last, out = run(params, config, arrays["pixel_values"], collect=True)
    states = out["hidden_states"]
    assert states.shape == (6, 2, 65, 80)
    for layer, expected in enumerate(arrays["hidden_states"]):
        assert_close(states[layer, 0], expected, 1e-4, f"hidden state {layer}")
    assert_close(last, arrays["last_hidden_state"], 1e-4, "last hidden state")
    assert_close(last[:, 0], arrays["pooler_output"], 1e-4, "pooled output")


def test_golden_bfloat16(golden):
    """No further from float32 than the reference's own bfloat16, at the worst place and on average."""
    config, params, arrays, facts = golden
    last, _ = run(params, config, arrays["pixel_values"], dtype=jnp.bfloat16)
    assert last.dtype == jnp.bfloat16
    exact, theirs = arrays["last_hidden_state"], arrays["last_hidden_state_bf16"]
    ours = np.asarray(last, np.float32)
    spread_of_theirs = facts["tolerance"]["bf16_vs_fp32_max_abs"]
    assert np.abs(theirs - exact).max() == pytest.approx(spread_of_theirs, rel=0.01)
    assert_close(ours, exact, spread_of_theirs, "bfloat16 against float32")
    assert np.sqrt(np.mean((ours - exact) ** 2)) < 1.1 * np.sqrt(np.mean((theirs - exact) ** 2))


@pytest.mark.parametrize("name", INTERPOLATED)
def test_golden_other_image_sizes(golden, name):
    config, params, arrays, _ = golden
    image = arrays[f"{name}/pixel_values"]
    rows, columns = (side // config.patch_size for side in image.shape[1:])
    table = params["embeddings"]["position_embedding"]
    resized = np.asarray(intern_vit.resize_positions(table, config.grid, rows, columns))
    assert_close(resized[1:], arrays[f"{name}/position_embedding"], 1e-5, "positions")
    assert np.array_equal(resized[0], table[0])
    last, out = run(params, config, image[None], collect=True)
    assert_close(out["hidden_states"][0, 0], arrays[f"{name}/embeddings"], 1e-5, "embeddings")
    assert_close(last[0], arrays[f"{name}/last_hidden_state"], 1e-4, "last hidden state")
    assert_close(last[0, 0], arrays[f"{name}/pooler_output"], 1e-4, "pooled output")


@pytest.mark.parametrize("size", [168, 70])
def test_golden_table_resized_for_good(golden, size):
    """A tower resized once runs as the one that resizes on every call."""
    config, params, arrays, _ = golden
    side = size // config.patch_size
    table = intern_vit.resize_positions(params["embeddings"]["position_embedding"], config.grid, side, side)
    assert_close(table, arrays[f"resized_checkpoint_{size}/position_embedding"], 1e-5, "table")
    resized = {**params, "embeddings": {**params["embeddings"], "position_embedding": table}}
    image = pixels(0, 1, 3, size, size)
    last, _ = run(resized, dataclasses.replace(config, image_size=size), image)
    assert_close(last, run(params, config, image)[0], 1e-5, "last hidden state")


@pytest.mark.parametrize("target", [3, 6, 7])
def test_golden_bicubic(golden, target):
    arrays = golden[2]
    matrix = intern_vit.bicubic_matrix(4, target)
    grid = (np.arange(16.0) ** 1.5).reshape(4, 4)
    assert_close(matrix @ grid @ matrix.T, arrays[f"bicubic_4_to_{target}"], 1e-6 * grid.max(), "bicubic")


def test_bicubic_against_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for source, rows, columns in [(1, 3, 2), (2, 5, 1), (5, 4, 9), (16, 32, 32), (32, 16, 24), (24, 7, 24), (7, 50, 3)]:
        table = rng.standard_normal((1 + source**2, 6)).astype(np.float32)
        ours = np.asarray(intern_vit.resize_positions(jnp.asarray(table), source, rows, columns))
        grid = torch.from_numpy(table[1:].reshape(source, source, 6)).permute(2, 0, 1)[None]
        theirs = torch.nn.functional.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)
        theirs = theirs[0].permute(1, 2, 0).reshape(rows * columns, 6).numpy()
        assert_close(ours[1:], theirs, 1e-5, f"{source} to {rows} x {columns}")


def test_native_size_is_the_identity(golden):
    config, params, _, _ = golden
    table = params["embeddings"]["position_embedding"]
    assert intern_vit.resize_positions(table, config.grid, config.grid, config.grid) is table


# Against transformers.


FIRST = {"norm_type": "rms_norm", "use_qk_norm": True}


@pytest.mark.parametrize(
    "options",
    [
        FIRST,
        {"norm_type": "rms_norm", "use_qk_norm": False, "attention_bias": True, "layer_norm_eps": 1e-3},
        {"norm_type": "layer_norm", "use_qk_norm": True, "attention_bias": True},
        {"norm_type": "rms_norm", "use_qk_norm": True, "layer_norm_eps": 0.3},  # which is not q_norm's and k_norm's
        {"norm_type": "layer_norm", "use_qk_norm": False, "layer_norm_eps": 1e-3, "num_attention_heads": 5},
        {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": True, "num_channels": 1},
    ],
    ids=str,
)
def test_against_transformers(options):
    torch = pytest.importorskip("torch")
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    sizes = {"hidden_size": 60, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96,
             "image_size": [56, 56], "patch_size": [14, 14]}  # fmt: skip
    text = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
            "intermediate_size": 8, "vocab_size": 8}  # fmt: skip
    hf = InternVLConfig(
        vision_config={**sizes, **options}, text_config=text, image_token_id=7, image_seq_length=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = spread(InternVLForConditionalGeneration(hf), seed=3)
    config = config_from_hf(hf.to_dict())
    params = torch_tree(config, model)["vision_model"]
    channels = config.vision.num_channels
    sizes = [(56, 56), (84, 84), (42, 70)] if options == FIRST else [(56, 56)]
    for height, width in sizes:
        image = pixels(height, 2, channels, height, width)
        with torch.no_grad():
            theirs = model.model.vision_tower(torch.from_numpy(image), output_hidden_states=True)
        last, out = run(params, config.vision, image, collect=True)
        for layer, expected in enumerate(theirs.hidden_states):
            assert_close(out["hidden_states"][layer], expected.numpy(), 1e-4, f"{height} x {width}, state {layer}")
        assert_close(last, theirs.last_hidden_state.numpy(), 1e-4, f"{height} x {width}")
        assert theirs.last_hidden_state.std() > 1


# Depth: how many layers run, and how they are run.


@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
def test_loop_and_remat_equal_the_scan(norm_type):
    """Stacked or a tuple, with activations kept or recomputed: the same states and the same gradients."""
    config, params = tiny(norm_type=norm_type, qkv_bias=True)
    image, weights = pixels(0, 2, 3, 16, 16), pixels(1, 2, 17, 24)

    def loss(params, remat):
        last, _ = modules.run_tower(params, config, image, remat=remat)
        return jnp.sum(last * weights), last

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    expected, last = jax.device_get(gradient(params, False))
    again, last_again = jax.device_get(gradient(params, True))
    assert_close(last_again, last, 1e-6, "remat")
    loop = {**params, "layers": unstack(params["layers"])}
    alone, last_alone = jax.device_get(gradient(loop, True))
    assert_close(last_alone, last, 1e-5, "loop")
    alone = {**alone, "layers": jax.tree.map(lambda *layers: np.stack(layers), *alone["layers"])}
    for path, value in jax.tree.leaves_with_path(expected):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        size = np.abs(value).max()
        assert size > 0, name
        assert_close(leaf(again, name), value, 1e-5 * size, f"remat: gradient of {name}")
        assert_close(leaf(alone, name), value, 1e-4 * size, f"loop: gradient of {name}")


def kept(params, layers):
    """A tower with its first `layers` layers only, stacked or a tuple."""
    stack = params["layers"]
    return {**params, "layers": jax.tree.map(lambda x: x[:layers], stack) if is_stacked(stack) else stack[:layers]}


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "tuple"])
def test_layers_past_the_last_one_that_runs(stacked):
    """They change nothing, get no gradient, and need not be there."""
    config, params = tiny(layers=4)
    image = pixels(0, 1, 3, 16, 16)
    states = run(params, config, image, collect=True)[1]["hidden_states"]
    assert states.shape[0] == 5
    if not stacked:
        params = {**params, "layers": unstack(params["layers"])}
    for count in (0, 1, 3, 4):
        last, out = run(params, config, image, collect=True, num_layers=count)
        assert_close(last, states[count], 1e-5, f"{count} layers")
        assert_close(out["hidden_states"], states[: count + 1], 1e-5, f"states of {count} layers")
    assert_close(run(kept(params, 3), config, image)[0], states[3], 1e-5, "3 layers kept")

    @jax.jit
    @jax.grad
    def gradient_of(params):
        return jnp.sum(modules.run_tower(params, config, image, num_layers=2)[0] ** 2)

    gradient = jax.device_get(gradient_of(params))
    for index in range(4):
        layer = gradient["layers"][index] if not stacked else jax.tree.map(lambda x, i=index: x[i], gradient["layers"])
        used = [np.any(x != 0) for x in jax.tree.leaves(layer)]
        assert all(used) if index < 2 else not any(used), index
    with pytest.raises(ValueError, match="5 layers are asked for, but the parameters hold 4"):
        modules.run_tower(params, config, image, num_layers=5)


def test_class_token_comes_first():
    """Row 0 is the class token: before any layer it does not depend on the image, behind them it does."""
    config, params = tiny()
    states = run(params, config, pixels(0, 2, 3, 16, 16), collect=True)[1]["hidden_states"]
    embeddings = params["embeddings"]
    first = embeddings["class_embedding"] + embeddings["position_embedding"][0]
    assert_close(states[0, :, 0], np.stack([first, first]), 1e-6, "class token")
    assert np.abs(states[-1, 0, 0] - states[-1, 1, 0]).max() > 0.1
    assert np.abs(states[0, 0, 1:] - states[0, 1, 1:]).min(axis=-1).max() > 0


# Stochastic depth.


def test_drop_path_is_off_without_a_key():
    config, params = tiny(drop_path_rate=0.5)
    image = pixels(0, 4, 3, 16, 16)
    still = run(params, dataclasses.replace(config, drop_path_rate=0.0), image)[0]
    assert np.array_equal(run(params, config, image)[0], still)
    dropped = [run(params, config, image, drop_path_key=jax.random.key(seed))[0] for seed in (0, 0, 1)]
    assert np.array_equal(dropped[0], dropped[1])
    assert np.abs(dropped[0] - dropped[2]).max() > 0.1
    rate0 = run(params, dataclasses.replace(config, drop_path_rate=0.0), image, drop_path_key=jax.random.key(0))[0]
    assert_close(rate0, still, 1e-5, "rate 0")


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "tuple"])
def test_drop_path_does_not_depend_on_layers_that_do_not_run(stacked):
    """The first layers of a tower drop what they drop in the whole one: rates and draws are a layer's own."""
    config, params = tiny(layers=4, drop_path_rate=0.5)
    image, key = pixels(0, 8, 3, 16, 16), jax.random.key(3)
    states = run(params, config, image, collect=True, drop_path_key=key)[1]["hidden_states"]
    assert np.abs(states - run(params, config, image, collect=True)[1]["hidden_states"])[3].max() > 0.1
    for tree in (params, kept(params, 3)):
        tree = tree if stacked else {**tree, "layers": unstack(tree["layers"])}
        last, _ = run(tree, config, image, num_layers=3, drop_path_key=key)
        assert_close(last, states[3], 1e-5, "3 of 4 layers")


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "tuple"])
def test_drop_path_drops_whole_branches_and_scales_the_rest(stacked):
    """Rates grow linearly with depth from 0; a branch of an image is dropped as a whole or divided by the rate kept."""
    config, params = tiny(image_size=4, drop_path_rate=0.4, hidden_size=8, num_attention_heads=1, intermediate_size=8)
    images = 3000
    image = np.repeat(pixels(0, 1, 3, 4, 4), images, axis=0)

    def branches(params, image, key=None):
        if not stacked:
            params = {**params, "layers": unstack(params["layers"])}
        last, out = run(params, config, image, collect=True, drop_path_key=key)
        return last - out["hidden_states"][0]

    drawn = {}
    for layer in range(3):
        for name in ("ls1", "ls2"):
            # One branch of one layer alone is scaled by something else than zero.
            layers = {**params["layers"]}
            for other in ("ls1", "ls2"):
                alive = np.arange(3)[:, None] == layer if other == name else False
                layers[other] = np.where(alive, layers[other], np.float32(0))
            alone = {**params, "layers": layers}
            whole = branches(alone, image[:1])[0]
            got = branches(alone, image, jax.random.key(5))
            probability = 1 - 0.4 * layer / 2
            kept = np.abs(got).max(axis=(1, 2)) > 0
            assert_close(got[kept], np.broadcast_to(whole / probability, got[kept].shape), 1e-5, f"{layer} {name}")
            deviation = np.sqrt(probability * (1 - probability) / images)
            assert abs(kept.mean() - probability) <= 4 * deviation, (layer, name, kept.mean())
            drawn[layer, name] = kept
    assert drawn[0, "ls1"].all()
    assert drawn[0, "ls2"].all()
    # Branches are drawn one by one: two of them agree as often as chance has it.
    for first, second in [((1, "ls1"), (1, "ls2")), ((1, "ls1"), (2, "ls1")), ((2, "ls1"), (2, "ls2"))]:
        p, q = drawn[first].mean(), drawn[second].mean()
        both = (drawn[first] & drawn[second]).mean()
        assert abs(both - p * q) < 4 * np.sqrt(p * q * (1 - p * q) / images), (first, second)


# Dtypes.


def test_stored_dtype_and_compute_dtype():
    """Parameters are cast where they are used: what they are stored in says only how exact they are."""
    config, params = tiny()
    image = pixels(0, 1, 3, 16, 16)
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    widened = jax.tree.map(lambda x: x.astype(np.float32), stored)
    low, wide = run(stored, config, image)[0], run(widened, config, image)[0]
    assert low.dtype == jnp.float32
    assert_close(low, wide, 1e-5, "stored in bfloat16")
    assert np.abs(low - run(params, config, image)[0]).max() > 1e-3  # the rounding itself shows
    narrow = [run(tree, config, image, dtype=jnp.bfloat16)[0] for tree in (stored, widened)]
    assert narrow[0].dtype == jnp.bfloat16
    # Position tables are resized in float32 whatever they are stored in; at the native size nothing differs at all.
    assert np.array_equal(narrow[0], narrow[1])
