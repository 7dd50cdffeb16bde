"""The training loss and the optimizer against the golden bundle and plain formulas; packed samples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import modules
from support.golden import DATA, assert_close, bundle, published
from support.tiny_model import IMAGE, batch_of, evaluate, random_params, tiny

from internvl_jax.config import PRESETS, load_config
from internvl_jax.data.batch import Batch
from internvl_jax.inference.loading import abstract_for_running
from internvl_jax.models import chat_model
from internvl_jax.models.attention import implementation
from internvl_jax.processing.conversation import image_token_index
from internvl_jax.training import objective, optimizer
from internvl_jax.training.objective import LossOptions
from internvl_jax.training.optimizer import AdamW

BUNDLE = DATA / "internvl_chat_v1_1"


class Golden:
    """The golden checkpoint's running layers, its training batch, and what the original code computed."""

    def __init__(self):
        from checkpoints_convert.convert import load_hf

        self.config = load_config(BUNDLE / "checkpoint")
        self.whole = jax.device_get(load_hf(BUNDLE / "checkpoint", chat_model.abstract_params(self.config)))
        self.params = jax.device_get(load_hf(BUNDLE / "checkpoint", abstract_for_running(self.config, jnp.float32)))
        self.arrays, facts = bundle("internvl_chat_v1_1")
        self.facts = facts["train"]
        image_token = facts["config"]["token_ids"]["<IMG_CONTEXT>"]
        real = self.arrays["train/attention_mask"].astype(np.int32)
        blank = np.zeros_like(self.arrays["images/rgb/eval"])
        self.batch = Batch(
            input_ids=self.arrays["train/input_ids"],
            labels=self.arrays["train/labels"],
            segment_ids=real,
            positions=np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32),
            image_index=image_token_index(self.arrays["train/input_ids"] == image_token),
            pixel_values=np.stack([self.arrays["images/rgb/eval"], self.arrays["images/gray/eval"], blank]),
        )

    def whole_tree(self, running):
        """A tree of the running layers with the others behind them, as they were (published names need all)."""
        layers = jax.tree.map(
            lambda new, old: np.concatenate([new, old[len(new) :]]),
            running["vision_model"]["layers"],
            self.whole["vision_model"]["layers"],
        )
        return {**running, "vision_model": {**running["vision_model"], "layers": layers}}


@pytest.fixture(scope="module")
def golden():
    pytest.importorskip("torch", reason="reads a published checkpoint")
    return Golden()


@pytest.fixture(scope="module")
def gradients(golden):
    weights = objective.loss_weights(golden.batch.labels, golden.batch.segment_ids)

    @jax.jit
    def run(params):
        def of(params):
            sums = objective.loss(
                {"params": params}, golden.config, golden.batch, weights, LossOptions(chunk=40, remat=True)
            )
            return sums.loss, sums

        return jax.value_and_grad(of, has_aux=True)(params)

    (_, sums), grads = run(golden.params)
    return jax.device_get(sums), jax.device_get(grads)


def test_golden_loss_and_gradients(golden, gradients):
    sums, grads = gradients
    assert float(sums.loss) == pytest.approx(float(golden.arrays["train/loss"]), abs=1e-4)
    assert sums.num_supervised == golden.facts["supervised_tokens"]
    assert sums.num_tokens == golden.arrays["train/attention_mask"].sum()
    assert float(optax.global_norm(grads)) == pytest.approx(golden.facts["global_grad_norm"], rel=1e-4)
    ours = published(golden.config, golden.whole_tree(grads))
    compared = [name for name in golden.arrays.files if name.startswith("train/grad/")]
    assert len(compared) == 24
    for name in compared:
        expected = golden.arrays[name]
        assert_close(ours[name.removeprefix("train/grad/")], expected, 1e-4 * np.abs(expected).max(), name)


@pytest.mark.parametrize("decay", ["all", "reference"])
def test_golden_adamw_step(golden, gradients, decay):
    given = golden.facts["optimizer"]
    settings = AdamW(
        given["lr"], given["weight_decay"], *given["betas"], given["eps"], max_grad_norm=None, warmup=0, decay=decay
    )
    adamw = optimizer.make_optimizer(settings, 10, golden.config)

    @jax.jit
    def step(params, grads):
        state = adamw.init(optimizer.full_precision(params))
        return optimizer.apply_gradients(adamw, grads, state, params)[0]

    after = published(golden.config, golden.whole_tree(jax.device_get(step(golden.params, gradients[1]))))
    before = published(golden.config, golden.whole)
    grads = published(golden.config, golden.whole_tree(gradients[1]))
    for name in golden.facts["parameters_without_gradient"]:
        assert np.array_equal(after[name], before[name]), name
    prefix = "train/after_step/" if decay == "all" else "train/after_step_trainer/"
    compared = [name for name in golden.arrays.files if name.startswith(prefix)]
    assert len(compared) == (24 if decay == "all" else 8)
    for key in compared:
        name, expected = key.removeprefix(prefix), golden.arrays[key]
        # Adam divides a gradient by its magnitude: where the gradient is rounding noise, so is the step.
        magnitude = np.abs(grads[name])
        certain = (magnitude > 1e-5) | (magnitude == 0)
        assert certain.mean() > 0.9, name
        assert_close(np.where(certain, after[name], 0), np.where(certain, expected, 0), 1e-6, name)
        assert_close(after[name], expected, 2.1 * given["lr"], name)


def test_decay_is_the_reference_trainers(golden):
    """For every parameter, also those whose step is not in the bundle."""
    mask = optimizer.decay_mask(golden.whole, golden.config)
    filled = jax.tree.map(lambda values, decays: np.full(values.shape, decays), golden.whole, mask)
    ours = {name for name, part in published(golden.config, filled).items() if not part.any()}
    assert ours == set(golden.facts["hf_trainer_no_decay"])


def test_norms_of_a_layer_norm_tower_do_not_decay():
    """The Trainer exempts torch's LayerNorms, but not InternViT's own RMSNorms."""
    for kind, decays in (("layer_norm", False), ("rms_norm", True)):
        config = tiny()
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, norm_type=kind))
        layers = optimizer.decay_mask(abstract_for_running(config, jnp.float32), config)["vision_model"]["layers"]
        for norm in ("norm1", "norm2"):
            assert layers[norm]["scale"] == decays
        assert not any(norm.get("bias") for norm in (layers["norm1"], layers["norm2"]))
        assert layers["mlp"]["fc1"]["kernel"]
        assert layers["ls1"]


def test_chunks_and_z_loss_equal_the_plain_formula():
    config = tiny()
    params, batch = random_params(config), batch_of(config, [[40], [33]], 50)
    weights = objective.loss_weights(batch.labels, batch.segment_ids)

    @jax.jit
    @jax.value_and_grad
    def plain(params):
        logits, _ = modules.forward(
            params, config, batch.input_ids, batch.pixel_values, batch.segment_ids > 0, image_token_id=IMAGE
        )
        normalizer = jax.nn.logsumexp(logits, -1)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], np.maximum(batch.labels[:, 1:], 0))
        return jnp.sum((losses + 0.01 * normalizer**2) * weights[:, :-1])

    @jax.jit
    @jax.value_and_grad
    def ours(params):
        return objective.loss({"params": params}, config, batch, weights, LossOptions(z_loss=0.01, chunk=16)).loss

    (expected, expected_grads), (value, grads) = plain(params), ours(params)
    assert float(value) == pytest.approx(float(expected), abs=1e-5)
    for name, theirs in expected_grads["language_model"]["layers"]["mlp"].items():
        largest = np.abs(theirs["kernel"]).max()
        assert_close(grads["language_model"]["layers"]["mlp"][name]["kernel"], theirs["kernel"], 1e-5 * largest, name)
    head, theirs = (tree["language_model"]["lm_head"]["kernel"] for tree in (grads, expected_grads))
    assert_close(head, theirs, 1e-5 * np.abs(theirs).max(), "lm_head")


def test_logits_of_the_whole_batch_are_never_held():
    """The compiled step has no array of the logits' size, in the forward or the backward pass."""
    config = tiny(vocab_size=4096)
    params, batch = random_params(config), batch_of(config, [[200], [200]], 256)
    weights = objective.loss_weights(batch.labels, batch.segment_ids)
    grad = jax.jit(
        jax.grad(lambda p: objective.loss({"params": p}, config, batch, weights, LossOptions(chunk=32)).loss)
    )
    text = grad.lower(params).compile().as_text()
    assert "f32[2,32,4096]" in text
    for shape in ("[2,256,4096]", "[8,2,32,4096]", "[512,4096]"):
        assert f"f32{shape}" not in text


@pytest.mark.parametrize("kind", ["xla", "pallas"])
def test_samples_in_a_row_do_not_see_each_other(kind):
    """Two samples in one row have the same loss as alone, and do not depend on each other's tokens."""
    config = tiny()
    params = random_params(config)
    packed = batch_of(config, [[40, 50]], 128)
    other = packed.replace(
        input_ids=np.where(packed.segment_ids == 2, (packed.input_ids * 7) % 50 + 5, packed.input_ids)
    )
    other = other.replace(input_ids=np.where(packed.input_ids == IMAGE, IMAGE, other.input_ids))
    assert (other.input_ids != packed.input_ids).sum() > 20

    def alone(number, start, length):
        def cut(x, fill):
            row = np.full((1, 128), fill, np.int32)
            row[0, :length] = x[0, start : start + length]
            return row

        ids = cut(packed.input_ids, 0)
        return Batch(
            ids, cut(packed.labels, -100), cut(np.minimum(packed.segment_ids, 1), 0),
            cut(packed.positions, 0), image_token_index(ids == IMAGE), packed.pixel_values[number - 1 : number],
        )  # fmt: skip

    with implementation(kind):
        together = evaluate(params, config, packed)
        first, second = evaluate(params, config, alone(1, 0, 40)), evaluate(params, config, alone(2, 40, 50))
        only_first = np.where(packed.segment_ids == 1, objective.loss_weights(packed.labels, packed.segment_ids), 0)
        before, after = (evaluate(params, config, batch, only_first) for batch in (packed, other))
    tokens = first.num_supervised + second.num_supervised
    assert together.num_supervised == tokens
    assert together.num_tokens == 90
    expected = (first.loss * first.num_supervised + second.loss * second.num_supervised) / tokens
    assert float(together.loss) == pytest.approx(float(expected), abs=2e-5)
    assert together.num_correct == first.num_correct + second.num_correct
    assert float(before.loss) == pytest.approx(float(after.loss), abs=1e-6)


def test_predictions_stay_within_a_sample():
    labels = np.asarray([[7, 8, 9, 7, 8, -100, 9, 9]])
    segments = np.asarray([[1, 1, 1, 2, 2, 2, 0, 0]])
    expected = [[True, True, False, True, False, False, False, False]]
    assert objective.supervised(labels, segments).tolist() == expected
    assert objective.supervised(jnp.asarray(labels), jnp.asarray(segments)).tolist() == expected


def test_means_over_tokens_and_over_devices():
    """The reference averages per device and micro-batch, then over these; rows say which device they would be on."""
    labels = np.full((2, 4, 9), -100)  # two micro-batches of four rows
    for (micro, row), count in {(0, 0): 8, (0, 1): 2, (0, 2): 3, (1, 0): 5, (1, 3): 1}.items():
        labels[micro, row, 1 : 1 + count] = 1
    segments = np.ones_like(labels)
    even = objective.loss_weights(labels, segments)
    assert even.sum() == pytest.approx(1)
    assert np.unique(even).tolist() == [0, np.float32(1 / 19)]
    losses = np.random.default_rng(0).random(labels.shape).astype(np.float32)
    counted = np.pad(labels[..., 1:] != -100, ((0, 0), (0, 0), (0, 1)))
    expected = np.mean([losses[m, r : r + 2][counted[m, r : r + 2]].mean() for m in (0, 1) for r in (0, 2)])
    assert (losses * objective.loss_weights(labels, segments, groups=2)).sum() == pytest.approx(expected, abs=1e-6)
    labels[1, 3] = -100  # a device without supervised tokens is not counted
    expected = np.mean([losses[m, r : r + 2][counted[m, r : r + 2]].mean() for m, r in ((0, 0), (0, 2), (1, 0))])
    assert (losses * objective.loss_weights(labels, segments, groups=2)).sum() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="4 rows do not divide into 3"):
        objective.loss_weights(labels, segments, groups=3)


def test_text_only_batches_with_and_without_image_slots():
    config = tiny()
    params = random_params(config)
    batch = batch_of(config, [[20, 20]], 48, images=0)
    without = evaluate(params, config, batch.replace(pixel_values=batch.pixel_values[:0]))
    assert float(evaluate(params, config, batch).loss) == float(without.loss)


# The optimizer.


def test_schedule_is_the_references():
    """transformers' get_cosine_schedule_with_warmup, by its formula."""
    settings = AdamW(2e-5, warmup=0.03)
    assert settings.warmup_steps(1000) == 30
    assert settings.warmup_steps(101) == 4  # rounded up
    assert AdamW(1.0, warmup=100).warmup_steps(1000) == 100
    rate = optimizer.schedule(settings, 1000)
    for step in (0, 1, 15, 29, 30, 31, 500, 999, 1000):
        expected = step / 30 if step < 30 else 0.5 * (1 + np.cos(np.pi * (step - 30) / 970))
        assert float(rate(step)) == pytest.approx(2e-5 * expected, rel=1e-4, abs=1e-12), step
    assert float(optimizer.schedule(AdamW(1.0, warmup=0), 10)(0)) == 1.0


def test_steps_equal_torchs():
    """Five clipped steps, decay included, in float32; and with bfloat16 parameters the moments are float32."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    params = {"mlp1": {"fc1": {"kernel": rng.standard_normal((7, 5)).astype(np.float32)}}}
    grads = [
        {"mlp1": {"fc1": {"kernel": rng.standard_normal((7, 5)).astype(np.float32) * s}}} for s in (9, 1, 0.1, 3, 5)
    ]
    settings = AdamW(1e-2, warmup=2, max_grad_norm=1.0)
    adamw = optimizer.make_optimizer(settings, 5, PRESETS["nano"]())
    weight = torch.nn.Parameter(torch.tensor(params["mlp1"]["fc1"]["kernel"]))
    theirs = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.05)
    ours, state = params, adamw.init(params)
    for step, grad in enumerate(grads):
        ours, state = optimizer.apply_gradients(adamw, grad, state, ours)
        weight.grad = torch.tensor(grad["mlp1"]["fc1"]["kernel"])
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        theirs.param_groups[0]["lr"] = float(optimizer.schedule(settings, 5)(step))
        theirs.step()
    assert_close(ours["mlp1"]["fc1"]["kernel"], weight.detach().numpy(), 1e-6, "after five steps")
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    moved, state = optimizer.apply_gradients(adamw, grads[0], adamw.init(optimizer.full_precision(low)), low)
    assert moved["mlp1"]["fc1"]["kernel"].dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}


def test_frozen_parts_have_no_state():
    config = tiny()
    trained, frozen = optimizer.split(random_params(config), ("mlp1", "vision_model"))
    assert set(trained) == {"mlp1", "vision_model"}
    assert set(frozen) == {"language_model"}
    state = optimizer.make_optimizer(AdamW(1e-5), 10, config).init(trained)
    assert chat_model.count_params(state) == 2 * chat_model.count_params(trained) + 2  # and two counters
    with pytest.raises(ValueError, match="mlp2 cannot be trained: the model has language_model, mlp1, vision_model"):
        optimizer.split(random_params(config), ("mlp2",))
