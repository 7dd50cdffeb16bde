"""The chat model, stage by stage: the golden bundle, transformers' InternVL, merging, and that everything matters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import modules
from support.chat_model_cases import IMAGE, TEXT, VISION, encode, forward, on_host, rows_with_images, tower
from support.compiler import PRODUCTION
from support.golden import DATA, assert_close, bundle, kl, leaf, published, spread, torch_tree, tree_of

from internvl_jax.config import config_from_hf, load_config
from internvl_jax.models import chat_model
from internvl_jax.models.layers import LayerNorm, RMSNorm

BUNDLE = DATA / "internvl_chat_v1_1"
LOGITS = 2e-4  # what equivalent computations may differ by; they do by about 2e-5
IMAGES = ["rgb", "exif_rot", "rgba", "gray", "palette"]


class Golden:
    """The golden checkpoint in memory, and what the original code computed with it."""

    def __init__(self):
        from checkpoints_convert.convert import load_hf

        self.config = load_config(BUNDLE / "checkpoint")
        self.params = jax.device_get(load_hf(BUNDLE / "checkpoint", chat_model.abstract_params(self.config)))
        self.arrays, self.facts = bundle("internvl_chat_v1_1")
        self.image_token = self.facts["config"]["token_ids"]["<IMG_CONTEXT>"]
        self.images = {prompt["id"]: prompt["images"] for prompt in self.facts["prompts"]}

    def pixels(self, names):
        return np.stack([self.arrays[f"images/{name}/quickstart"] for name in names])

    def run(self, name, tokens=97, *, program=forward, **options):
        """A golden prompt padded to `tokens` behind its end and given two images, so that all run the same program."""
        ids = self.arrays[f"logits/{name}/input_ids"]
        padded = np.zeros((1, tokens), np.int32)
        padded[0, : len(ids)] = ids
        names = [*self.images[name], "palette", "palette"][:2]
        params = options.pop("params", self.params)
        logits, out = program(
            params, self.config, padded, self.pixels(names), np.arange(tokens)[None] < len(ids),
            image_token_id=self.image_token, **options,
        )  # fmt: skip
        return logits[0, : len(ids)], out


@pytest.fixture(scope="module")
def golden():
    pytest.importorskip("torch")
    return Golden()


# Vision to visual tokens.


def test_golden_vision_stages(golden):
    """All stages of one image among five others, which shows too that images do not see each other."""
    arrays = golden.arrays
    pixels = np.concatenate([golden.pixels(IMAGES), arrays["images/rgb/eval"][None]])
    projected, out = encode(golden.params, golden.config, pixels, collect=True)
    states = arrays["vision/hidden_states"]
    assert out["hidden_states"].shape[0] == 4  # layers past select_layer do not run
    for layer in range(4):
        assert_close(out["hidden_states"][layer, 0], states[layer], 1e-4, f"hidden state {layer}")
    assert_close(out["selected"][0], arrays["vision/selected"], 1e-4, "selected")
    assert_close(out["unshuffled"][0], arrays["vision/pixel_shuffle_v1"].reshape(16, -1), 1e-4, "unshuffled")
    assert_close(out["projected"][0], arrays["vision/mlp1_v1"], 1e-4, "projected")
    assert np.array_equal(out["projected"], projected)
    assert_close(projected[:5], arrays["vision/mlp1_batch"], 1e-4, "batch")
    assert_close(projected[5], arrays["vision/mlp1_eval_path"], 1e-4, "evaluation path")


def test_golden_whole_tower(golden):
    last, out = tower(golden.params["vision_model"], golden.config.vision, golden.pixels(["rgb"]), collect=True)
    for layer, expected in enumerate(golden.arrays["vision/hidden_states"]):
        assert_close(out["hidden_states"][layer, 0], expected, 1e-4, f"hidden state {layer}")
    assert_close(last[0, 0], golden.arrays["vision/pooler_output"], 1e-4, "pooled output")


def test_golden_second_version(golden):
    config = dataclasses.replace(golden.config, ps_version="v2")
    projected, out = encode(golden.params, config, golden.pixels(["rgb"]), collect=True)
    expected = golden.arrays["vision/pixel_shuffle_v2"].reshape(16, -1)
    assert_close(out["unshuffled"][0], expected, 1e-4, "unshuffled")
    assert_close(projected[0], golden.arrays["vision/mlp1_v2"], 1e-4, "projected")


@pytest.mark.parametrize("tower", ["vit", "llm"])
def test_golden_norms(golden, tower):
    """Rows of tiny variance show the eps of either tower's RMSNorm."""
    if tower == "vit":
        eps = golden.config.vision.layer_norm_eps
        scale = golden.params["vision_model"]["layers"]["norm1"]["scale"][0]
    else:
        eps = golden.config.text.rms_norm_eps
        scale = golden.params["language_model"]["norm"]["scale"]
    x, expected = golden.arrays[f"probe/{tower}_norm_input"], golden.arrays[f"probe/{tower}_norm_output"]

    def norm(eps, x):
        return RMSNorm((x.shape[-1],), eps).apply({"params": {"scale": scale}}, x)

    assert_close(norm(eps, jnp.asarray(x)), expected, 1e-5, tower)
    assert np.abs(norm(10 * eps, jnp.asarray(x)) - expected).max() > 1e-2
    if tower == "llm":  # in bfloat16: statistics in float32, cast, then scaled
        x = jnp.asarray(golden.arrays["probe/llm_norm_bf16_input"], jnp.bfloat16)
        assert np.array_equal(norm(eps, x).astype(jnp.float32), golden.arrays["probe/llm_norm_bf16_output"])


@pytest.mark.parametrize(("norm", "dtype"), [(RMSNorm((4,), 1e-6), "bfloat16"), (LayerNorm(4, 1e-6), "float32")])
def test_a_norm_whose_squares_overflow_is_not_finite(norm, dtype):
    """Zeros, the product of what overflowed and 1/inf, would become an answer; other rows are as they are."""
    scale = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    x = jnp.asarray([[1, 2, 3, -4], [1e30, 2e30, 3e30, -4e30]], dtype)
    small, large = np.asarray(norm.apply({"params": scale}, x), np.float32)
    assert_close(small, norm.apply({"params": scale}, x[0]).astype(jnp.float32), 1e-6, "other rows")
    assert np.abs(small).min() > 0.1
    assert np.isnan(large).all()


# Logits.


def test_golden_logits(golden):
    for name in ("en_single", "zh_multi_turn", "two_separate"):
        logits, out = golden.run(name, collect=True)
        expected = golden.arrays[f"logits/{name}/fp32"]
        assert_close(logits, expected, LOGITS, name)
        assert kl(expected, logits).max() < 1e-4
        if name == "en_single":
            for layer, state in enumerate(golden.arrays[f"logits/{name}/llm_hidden_states"]):
                ours = out["language"]["hidden_states"][layer, 0, : len(state)]
                assert_close(ours, state, 1e-4, f"language hidden state {layer}")


def test_golden_batch(golden):
    """Rows padded on the left, each with its image."""
    name = "batch/batch_two"
    mask = golden.arrays[f"{name}/attention_mask"]
    logits, _ = forward(
        golden.params, golden.config, golden.arrays[f"{name}/input_ids"],
        golden.pixels(golden.facts["batches"][0]["images"]), mask > 0, image_token_id=golden.image_token,
    )  # fmt: skip
    expected = np.where(mask[..., None] > 0, golden.arrays["logits/batch_two/fp32"], 0)
    assert_close(np.where(mask[..., None] > 0, logits, 0), expected, LOGITS, name)


def test_golden_bfloat16(golden):
    """KL of at most 1e-2, no further off than the reference's own bfloat16, the same tokens where they are clear."""
    exact, theirs = (golden.arrays[f"logits/en_single/{dtype}"] for dtype in ("fp32", "bf16"))
    logits, _ = golden.run("en_single", dtype=jnp.bfloat16)
    assert logits.dtype == jnp.float32
    divergence = kl(exact, logits)
    assert divergence.max() <= 1e-2, f"largest KL {divergence.max():.3g} at position {divergence.argmax()}"
    assert np.sqrt(np.mean((logits - exact) ** 2)) < 1.1 * np.sqrt(np.mean((theirs - exact) ** 2))
    second, first = np.sort(exact, axis=-1)[:, -2:].T
    clear = first - second > golden.facts["tolerance"]["bf16_vs_fp32_max_abs"]
    assert clear.mean() > 0.5
    assert np.array_equal(np.argmax(logits, axis=-1)[clear], exact.argmax(axis=-1)[clear])


def test_stored_dtype(golden):
    """The published weights are bfloat16: stored as such and computed in float32 they give the same logits."""
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), golden.params)
    program = on_host(modules.forward, compiler_options=PRODUCTION)  # sums in the same order, whatever is converted
    logits = [golden.run("en_single", params=params, program=program)[0] for params in (stored, golden.params)]
    assert_close(*logits, 1e-5, "stored in bfloat16")


def test_every_parameter_matters(golden):
    """No tolerance hides a parameter: a tenth of noise on any tensor of the checkpoint, or zeros, move the logits."""
    expected = golden.run("en_single")[0]
    rng = np.random.default_rng(0)

    def change(path, values, layer):
        """The largest change of the logits where the leaf (or its layer) has these values."""
        *parents, name = path.split("/")
        params = jax.tree.map(lambda x: x, golden.params)  # a new tree of the same leaves
        node = leaf(params, "/".join(parents))
        if layer is None:
            node[name] = values
        else:
            node[name] = node[name].copy()
            node[name][layer] = values
        return np.abs(golden.run("en_single", params=params)[0] - expected).max()

    changes, layers = {}, {"vision_model": 6, "language_model": 4}
    for path, values in jax.tree.leaves_with_path(golden.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        stack = name.split("/")[1] == "layers"
        for layer in range(layers[name.split("/")[0]]) if stack else [None]:
            part = values if layer is None else values[layer]
            shake = 0.1 * np.sqrt(np.mean(part**2)) * rng.standard_normal(part.shape).astype(np.float32)
            changes[name, layer] = change(name, part + shake, layer), change(name, 0 * part, layer)
    unused = {key: both for key, both in changes.items() if key[0].startswith("vision_model/layers") and key[1] >= 3}
    assert len(unused) == 3 * 13
    assert set(unused.values()) == {(0.0, 0.0)}
    weakest = sorted((min(both), key) for key, both in changes.items() if key not in unused)
    assert weakest[0][0] > 20 * LOGITS, weakest[:5]


# Training: loss, gradients, one step.


@pytest.fixture(scope="module")
def gradients(golden):
    arrays = golden.arrays
    ids, labels = arrays["train/input_ids"], arrays["train/labels"]
    # The reference feeds a white image for the row without one and drops its features; here the row has none.
    pixels = np.stack([arrays["images/rgb/eval"], arrays["images/gray/eval"]])

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits, _ = modules.forward(
            params, golden.config, ids, pixels, arrays["train/attention_mask"] > 0,
            image_token_id=golden.image_token, remat=True,
        )  # fmt: skip
        targets = labels[:, 1:]
        likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), np.maximum(targets, 0)[..., None], -1)
        return -jnp.sum(jnp.where(targets >= 0, likelihood[..., 0], 0)) / np.sum(targets >= 0)

    return jax.device_get(loss(golden.params))


def test_golden_loss_and_gradients(golden, gradients):
    loss, gradient = gradients
    facts = golden.facts["train"]
    assert float(loss) == pytest.approx(float(golden.arrays["train/loss"]), abs=1e-4)
    assert np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(gradient))) == pytest.approx(
        facts["global_grad_norm"], rel=1e-4
    )
    ours = published(golden.config, gradient)
    for name, norm in facts["per_parameter_grad_norm"].items():
        assert np.linalg.norm(ours[name]) == pytest.approx(norm, rel=1e-3, abs=1e-6), name
    for name in facts["parameters_without_gradient"]:
        assert not np.any(ours[name]), name
    assert set(ours) == set(facts["per_parameter_grad_norm"]) | set(facts["parameters_without_gradient"])
    compared = [name for name in golden.arrays.files if name.startswith("train/grad/")]
    assert len(compared) == 24
    for name in compared:
        expected = golden.arrays[name]
        assert_close(ours[name.removeprefix("train/grad/")], expected, 1e-4 * np.abs(expected).max(), name)


@pytest.mark.parametrize("trainer", [False, True], ids=["all decay", "Hugging Face's Trainer"])
def test_golden_adamw_step(golden, gradients, trainer):
    """optax's AdamW on the layers that run; the others get neither update nor decay, as in torch."""
    options = golden.facts["train"]["optimizer"]
    exempt = set(golden.facts["train"]["hf_trainer_no_decay"]) if trainer else set()

    def used(tree):
        vision = tree["vision_model"]
        layers = jax.tree.map(lambda x: x[: golden.config.num_vision_layers], vision["layers"])
        return {**tree, "vision_model": {**vision, "layers": layers}}

    # Decayed or not, by published name; a stacked leaf holds the same of every layer.
    ones = jax.tree.map(lambda x: np.ones(x.shape, bool), golden.params)
    decays = {name: np.full(part.shape, name not in exempt) for name, part in published(golden.config, ones).items()}
    mask = jax.tree.map(lambda x: np.unique(x).tolist(), tree_of(golden.config, decays))
    assert all(len(values) == 1 for values in jax.tree.leaves(mask, is_leaf=lambda x: isinstance(x, list)))
    mask = jax.tree.map(lambda values: bool(values[0]), mask, is_leaf=lambda x: isinstance(x, list))
    optimizer = optax.adamw(
        options["lr"], *options["betas"], options["eps"], weight_decay=options["weight_decay"], mask=mask
    )
    params, gradient = used(golden.params), used(gradients[1])

    @jax.jit
    def step(params, gradient):
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    after = jax.device_get(step(params, gradient))
    layers = jax.tree.map(
        lambda new, old: np.concatenate([new, old[len(new) :]]),
        after["vision_model"]["layers"], golden.params["vision_model"]["layers"],
    )  # fmt: skip
    after = published(golden.config, {**after, "vision_model": {**after["vision_model"], "layers": layers}})
    before, slopes = (published(golden.config, tree) for tree in (golden.params, gradients[1]))
    for name in golden.facts["train"]["parameters_without_gradient"]:
        assert np.array_equal(after[name], before[name]), name
    prefix = "train/after_step_trainer/" if trainer else "train/after_step/"
    compared = [name for name in golden.arrays.files if name.startswith(prefix)]
    assert len(compared) == (8 if trainer else 24)
    for key in compared:
        name = key.removeprefix(prefix)
        expected, slope = golden.arrays[key], np.abs(slopes[name])
        # Adam divides a gradient by its size: where that is rounding noise, so is the step, up to the rate either way.
        certain = (slope > 1e-5) | (slope == 0)
        assert certain.mean() > 0.9, name
        assert_close(np.where(certain, after[name], 0), np.where(certain, expected, 0), 1e-6, name)
        assert_close(after[name], expected, 2.1 * options["lr"], name)
        if not trainer or name not in exempt:
            continue
        # Exempt from decay, which the other test sees in the same parameter.
        assert np.abs(golden.arrays[key] - golden.arrays[f"train/after_step/{name}"]).max() > 1e-6


# Against transformers.


@pytest.mark.parametrize(
    ("vision", "text", "options", "per_image"),
    [
        ({}, {}, {"vision_feature_layer": -2}, 4),
        ({"attention_bias": True}, {"rope_theta": 5e5}, {"vision_feature_layer": 2, "downsample_ratio": 0.25}, 1),
        (
            {"norm_type": "layer_norm", "use_qk_norm": False, "num_attention_heads": 4},
            {},
            {"vision_feature_layer": -1, "downsample_ratio": 1.0, "tie_word_embeddings": True},
            16,
        ),
    ],
    ids=["layer -2", "layer 2, folded by 4", "last layer, not folded, tied"],
)
def test_against_transformers(vision, text, options, per_image):
    """Rows with two images, none and one, padded on the left."""
    torch = pytest.importorskip("torch")
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    hf = InternVLConfig(
        vision_config={**VISION, **vision}, text_config={**TEXT, **text}, image_token_id=IMAGE,
        image_seq_length=per_image, **{"tie_word_embeddings": False, **options},
    )  # fmt: skip
    model = spread(InternVLForConditionalGeneration(hf), seed=1)
    config = config_from_hf(hf.to_dict())
    assert config.tokens_per_image == per_image
    params = torch_tree(config, model)
    assert ("lm_head" in params["language_model"]) == (not options.get("tie_word_embeddings", False))
    ids, mask = rows_with_images([2, 0, 1], per_image)
    pixels = np.random.default_rng(1).standard_normal((3, 3, 56, 56)).astype(np.float32)
    with torch.no_grad():
        theirs = model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
            pixel_values=torch.from_numpy(pixels),
        ).logits.numpy()  # fmt: skip
        features = model.model.get_image_features(torch.from_numpy(pixels)).pooler_output
    logits, out = forward(params, config, ids, pixels, mask > 0, image_token_id=IMAGE, collect=True)
    features = torch.cat(list(features)).numpy().reshape(3, per_image, -1)
    assert_close(out["vision"]["projected"], features, 1e-4, "projected")
    assert 1 < theirs.std() < 20
    real = mask[..., None] > 0
    assert_close(np.where(real, logits, 0), np.where(real, theirs, 0), LOGITS, "logits")


def test_projector_against_transformers():
    """With rows of tiny variance, where LayerNorm's eps shows."""
    torch = pytest.importorskip("torch")
    from transformers import InternVLConfig
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

    hf = InternVLConfig(vision_config=VISION, text_config=TEXT, image_token_id=IMAGE, image_seq_length=4)
    module = spread(InternVLMultiModalProjector(hf), seed=2)
    state = {name: values.detach().numpy() for name, values in module.state_dict().items()}
    params = {
        "norm": {"scale": state["layer_norm.weight"], "bias": state["layer_norm.bias"]},
        "fc1": {"kernel": state["linear_1.weight"].T, "bias": state["linear_1.bias"]},
        "fc2": {"kernel": state["linear_2.weight"].T, "bias": state["linear_2.bias"]},
    }
    x = np.random.default_rng(0).standard_normal((2, 5, 192)).astype(np.float32) * np.logspace(-4, 1, 5)[:, None]
    x = x.astype(np.float32)
    with torch.no_grad():
        theirs = module(torch.from_numpy(x)).numpy()
    config = config_from_hf(hf.to_dict()).projector
    assert_close(modules.project(params, config, x), theirs, 1e-5, "projector")
