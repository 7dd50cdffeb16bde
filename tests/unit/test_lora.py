"""Adapters: what they add, merged and unmerged, on disk, and in peft's layout and back against peft itself."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import modules
from support.adapter_cases import BOTH, adapters_of, llama
from support.golden import assert_close, torch_tree
from support.quantize_cases import quantized
from support.tiny_model import batch_of, evaluate, evaluate_variables, random_params, tiny

from internvl_jax import checkpoint, lora
from internvl_jax.cli import train
from internvl_jax.config import config_from_hf
from internvl_jax.inference.loading import unstack_towers
from internvl_jax.lora import Lora, LoraError
from internvl_jax.models import layers, param_sharding
from internvl_jax.models.axes import linear_layers
from internvl_jax.models.chat_model import InternVLChat
from internvl_jax.models.layers import ADAPTER, Adapter, Linear
from internvl_jax.parallel import partitioning
from internvl_jax.training import objective, recipes
from internvl_jax.training.runs import resizing
from internvl_jax.utils import files


def test_fresh_adapters_change_nothing_and_train_only_their_second_matrix():
    config = tiny()
    params, batch = random_params(config), batch_of(config, [[40]], 48)
    adapters = lora.init_adapters(jax.random.key(0), params, BOTH)
    attention = adapters["language_model"]["layers"]["self_attn"]
    assert attention["q_proj"]["lora_a"].shape == (2, 128, 4)
    assert attention["q_proj"]["lora_b"].shape == (2, 4, 4, 32)
    assert attention["o_proj"]["lora_a"].shape == (2, 4, 32, 4)
    assert np.abs(attention["q_proj"]["lora_a"]).max() == pytest.approx(1 / np.sqrt(128), rel=0.02)
    assert (
        evaluate_variables(lora.attach(params, adapters, BOTH), config, batch).loss
        == evaluate(params, config, batch).loss
    )

    @jax.jit
    @jax.grad
    def slopes(adapters):
        weights = objective.loss_weights(batch.labels, batch.segment_ids)
        return objective.loss(lora.attach(params, adapters, BOTH), config, batch, weights).loss

    for keys, leaf in jax.tree_util.tree_leaves_with_path(slopes(adapters)):
        assert np.any(leaf) == (keys[-1].key == "lora_b"), partitioning.path_of(keys)


def test_merged_equals_unmerged():
    config = tiny()
    params, batch = random_params(config), batch_of(config, [[40], [45]], 48)
    adapters = adapters_of(params)
    attached = evaluate_variables(lora.attach(params, adapters, BOTH), config, batch)
    merged = evaluate(lora.merge(params, adapters, BOTH), config, batch)
    assert abs(attached.loss - evaluate(params, config, batch).loss) > 0.01
    assert float(attached.loss) == pytest.approx(float(merged.loss), abs=2e-5)
    variables = lora.attach(params, adapters, BOTH)
    by_layer = {collection: unstack_towers(tree) for collection, tree in variables.items()}
    assert evaluate_variables(by_layer, config, batch).loss == pytest.approx(attached.loss, abs=2e-5)


def test_a_merged_kernel_is_rounded_once():
    """1 + 2^-8 + 2^-17 is nearer to bfloat16's 1 + 2^-7 than to 1; rounded before it is added, the product makes 1."""

    def tree(**leaves):
        layer = {name: jnp.full((1, 1, 1), value, dtype) for name, (value, dtype) in leaves.items()}
        return {"language_model": {"layers": {"mlp": {"up_proj": layer}}}}

    params = tree(kernel=(1, jnp.bfloat16))
    adapters = tree(lora_a=(1, jnp.float32), lora_b=(2**-8 + 2**-17, jnp.float32))
    merged = lora.merge(params, adapters, {"language_model": Lora(1, alpha=1)})
    kernel = merged["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert float(kernel[0, 0, 0]) == 1 + 2**-7


def test_every_target_matters():
    config = tiny()
    params, batch = random_params(config), batch_of(config, [[40]], 48)
    adapters = adapters_of(params)
    whole = evaluate_variables(lora.attach(params, adapters, BOTH), config, batch).loss
    for tower, targets in {tower: linear_layers(tower) for tower in lora.ADAPTABLE}.items():
        for target in targets:
            without = {**BOTH, tower: dataclasses.replace(BOTH[tower], targets=(target,))}
            zeroed = jax.tree.map(jnp.copy, adapters)
            lora.leaf_at(zeroed[tower]["layers"], target)["lora_b"] *= 0
            assert abs(evaluate_variables(lora.attach(params, zeroed, without), config, batch).loss - whole) > 1e-5, (
                target
            )


def test_dropout_is_the_adapters_alone_and_right_on_average():
    config = tiny(num_hidden_layers=1)
    params, batch = random_params(config), batch_of(config, [[40]], 48)
    settings = {"language_model": Lora(4, dropout=0.5)}
    adapters = adapters_of(params, settings, 0.05)

    variables = lora.attach(params, adapters, settings)
    first = jax.tree.map(
        lambda leaf: leaf[0], {name: tree["language_model"]["layers"] for name, tree in variables.items()}
    )
    q_proj = {name: tree["self_attn"]["q_proj"] for name, tree in first.items()}
    layer = Linear("BTD,DNH->BTNH", (128, 4, 32), ("embed", "heads", "head_dim"), jnp.float32)
    x = jax.random.normal(jax.random.key(9), (1, 3, 128))
    hidden = jax.jit(lambda key: layer.apply(q_proj, x, rngs={"dropout": key}))

    one, other = hidden(jax.random.key(1)), hidden(jax.random.key(2))
    assert np.abs(one - other).max() > 0.01
    mean = np.mean([hidden(jax.random.key(i)) for i in range(400)], axis=0)
    assert_close(mean, layer.apply(q_proj, x), 0.15, "mean over 400 draws")
    alone = layer.apply({"params": q_proj["params"]}, x)
    assert_close(
        layer.apply({"params": q_proj["params"]}, x, rngs={"dropout": jax.random.key(1)}), alone, 0, "no adapter"
    )
    losses = {
        float(evaluate_variables(variables, config, batch, rngs={"dropout": jax.random.key(i)}).loss) for i in (1, 2)
    }
    assert len(losses) == 2


@pytest.mark.parametrize(
    ("eqn", "axes", "inputs"),
    [("BTD,DF->BTF", ("embed", "mlp"), (96,)), ("BTNH,NHD->BTD", ("heads", "head_dim", "embed"), (4, 24))],
)
def test_dropout_drops_its_share_and_scales_the_rest(eqn, axes, inputs):
    """With identities for matrices and no kernel, the adapter's output is its input after dropout."""
    width, drop = 96, 0.1
    x = 1 + jax.random.uniform(jax.random.key(0), (8, 50, *inputs))  # nowhere zero
    identity = np.eye(width, dtype=np.float32)
    variables = {
        "params": {"kernel": np.zeros((*inputs, width), np.float32)},
        "lora": {ADAPTER: Adapter(identity.reshape(*inputs, width), identity, drop)},
    }
    layer = Linear(eqn, (*inputs, width), axes, jnp.float32)
    apply = jax.jit(lambda variables, x: layer.apply(variables, x, rngs={"dropout": jax.random.key(5)}))
    out = np.asarray(apply(variables, x)).reshape(8, 50, width)
    x = np.asarray(x).reshape(out.shape)
    dropped = out == 0
    assert dropped.mean() == pytest.approx(drop, abs=0.01)
    assert np.ptp(dropped.mean((0, 1))) < 0.15  # 400 draws for each number of the width
    assert np.ptp(dropped.mean((1, 2))) < 0.05
    assert_close(out[~dropped], x[~dropped] / (1 - drop), 1e-5, "what is kept")
    assert np.sum(out * x) / np.sum(x * x) == pytest.approx(1, abs=0.02)


def test_layers_targets_and_towers_drop_apart(monkeypatch):
    """Every adapter draws its mask from a key of its own, at its tower's rate; without an rng nothing is dropped."""
    config = tiny()
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_hidden_layers=5))
    params, batch = random_params(config), batch_of(config, [[40]], 48)
    settings = {"language_model": Lora(2, dropout=0.25), "vision_model": Lora(2, dropout=0.5)}
    drawn = []

    def record(key, keep, shape, *, heads):
        jax.debug.callback(lambda data: drawn.append((keep, tuple(data.tolist()))), jax.random.key_data(key))
        return jnp.ones(shape, bool)

    monkeypatch.setattr(layers, "dropout_mask", record)
    variables = lora.attach(params, adapters_of(params, settings), settings)
    evaluate_variables(variables, config, batch)
    jax.effects_barrier()
    assert not drawn
    evaluate_variables(variables, config, batch, rngs={"dropout": jax.random.key(3)})
    jax.effects_barrier()
    expected = {
        1 - one.dropout: len(linear_layers(tower)) * jax.tree.leaves(params[tower]["layers"])[0].shape[0]
        for tower, one in settings.items()
    }
    assert {keep: sum(one == keep for one, _ in drawn) for keep in expected} == expected
    assert len({key for _, key in drawn}) == len(drawn) == sum(expected.values())


def test_fresh_adapters_are_drawn_within_pefts_bounds():
    """Uniform within 1 / sqrt(inputs), where o_proj and attn/proj sum over heads and their width."""
    config = tiny()
    params = random_params(config)
    settings = {"language_model": Lora(8), "vision_model": Lora(8)}
    fresh = lora.init_adapters(jax.random.key(0), params, settings)
    text, vision = config.text, config.vision
    inputs = {
        "self_attn/o_proj": text.num_attention_heads * text.head_dim,
        "mlp/down_proj": text.intermediate_size,
        "attn/proj": vision.hidden_size,
        "mlp/fc2": vision.intermediate_size,
    }
    drawn = []
    for tower, width in (("language_model", text.hidden_size), ("vision_model", vision.hidden_size)):
        for target in linear_layers(tower):
            values = np.asarray(lora.leaf_at(fresh[tower]["layers"], target)["lora_a"])
            bound = 1 / np.sqrt(inputs.get(target, width))
            assert bound * 0.98 < np.abs(values).max() <= bound, target
            assert abs(values.mean()) < 0.1 * bound, target
            drawn.append(values[0].ravel()[:20] / bound)
            if len(values) > 1:  # layers are drawn apart, and so are targets
                assert np.abs(values[0] - values[1]).max() > bound, target
    assert len(np.unique(np.round(drawn, 4), axis=0)) == len(drawn)


def test_the_first_layers_alone():
    """Adapters of fewer layers than there are, as of a tower up to select_layer."""
    config = tiny()
    params = random_params(config)
    settings = {"language_model": Lora(2, alpha=3, targets=("self_attn/o_proj",))}
    pair = adapters_of(params, settings)["language_model"]["layers"]["self_attn"]["o_proj"]
    first = {"language_model": {"layers": {"self_attn": {"o_proj": jax.tree.map(lambda leaf: leaf[:1], pair)}}}}
    merged = lora.merge(params, first, settings)["language_model"]["layers"]["self_attn"]["o_proj"]["kernel"]
    kernel = params["language_model"]["layers"]["self_attn"]["o_proj"]["kernel"]
    added = 1.5 * np.einsum("NHR,RD->NHD", pair["lora_a"][0], pair["lora_b"][0])
    assert_close(merged[0], kernel[0] + added, 1e-5, "merged")
    np.testing.assert_array_equal(merged[1:], kernel[1:])
    with pytest.raises(LoraError, match=r"o_proj/lora_a is for 9 layers, the model has"):
        lora.check(params, jax.tree.map(lambda leaf: np.repeat(leaf, 9, 0), first))


def test_adapters_on_quantized_weights():
    """They train and serve beside int8 kernels; they cannot be merged into them."""
    config = tiny()
    params, batch = random_params(config), batch_of(config, [[40]], 48)
    adapters, low = adapters_of(params), quantized(params, "int8")
    assert evaluate_variables(lora.attach(low, adapters, BOTH), config, batch).loss == pytest.approx(
        evaluate_variables(lora.attach(params, adapters, BOTH), config, batch).loss, rel=0.02
    )
    with pytest.raises(LoraError, match="merge first, then quantize"):
        lora.merge(low, adapters, BOTH)


def test_saved_alone_and_checked(tmp_path):
    config = tiny()
    params = random_params(config)
    adapters = adapters_of(params)
    lora.save(tmp_path / "adapter", adapters, BOTH)
    again, settings = lora.load(tmp_path / "adapter", params)
    assert settings == BOTH
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    wider = random_params(tiny(intermediate_size=64))
    with pytest.raises(LoraError, match=r"mlp/down_proj/lora_a is for \[352\], the model has \[64\]"):
        lora.load(tmp_path / "adapter", wider)
    with pytest.raises(LoraError, match="holds no adapter"):
        lora.load(tmp_path)
    some = {"language_model": Lora(4, alpha=1, targets=("self_attn/v_proj", "mlp/up_proj"))}
    lora.save(tmp_path / "some", adapters_of(params, some), some)
    assert lora.load(tmp_path / "some", params)[1] == some
    with pytest.raises(LoraError, match="adapters of vision_model go to attn/qkv"):
        Lora(4, targets=("q_proj",)).targets_of("vision_model")
    with pytest.raises(LoraError, match="a rank is positive"):
        Lora(0)


def test_adapters_that_are_damaged_or_unreadable_say_which(tmp_path, monkeypatch):
    adapters = adapters_of(random_params(tiny()))
    lora.leaf_at(adapters["vision_model"]["layers"], "mlp/fc1")["lora_b"] *= np.nan
    lora.save(tmp_path / "adapter", adapters, BOTH)
    with pytest.raises(checkpoint.CheckpointError, match=r"vision_model/layers/mlp/fc1/lora_b holds .* not finite"):
        lora.load(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter")
    lora.save(tmp_path / "adapter", adapters_of(random_params(tiny())), BOTH)
    written = tmp_path / "adapter" / lora.FILE
    text = written.read_text()
    for damaged, message in (
        (text[:-9], "not readable JSON"),
        ("[]", "is damaged"),
        ('{"language_model": {}}', "damaged"),
    ):
        written.write_text(damaged)
        with pytest.raises(ValueError, match=message):
            lora.load(tmp_path / "adapter")
    written.write_text(text)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LoraError, match="Hugging Face's peft: read it with 'internvl-jax adapters from-peft"):
        lora.load(tmp_path)

    def fails(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(lora.files, "read_text", fails)
    with pytest.raises(OSError, match="Input/output error"):  # says nothing about what the directory holds
        lora.load(tmp_path / "adapter")


def test_one_process_writes_an_adapter_and_nothing_is_left(tmp_path, monkeypatch, logged):
    adapters = adapters_of(random_params(tiny()), {"language_model": Lora(2)})
    target = tmp_path / "new" / "my adapter"
    with files.claim(target), pytest.raises(files.OutputInUseError, match=r"my adapter is being written by process"):
        lora.save(target, adapters, {"language_model": Lora(2)})
    left = files.temporary_path(target, 4194305)  # of a process that was killed
    (left / "params").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    lora.save("~/new/../new/my adapter/", adapters, {"language_model": Lora(2)})
    assert logged == [f"removing {left}, which an interrupted process left"]
    assert [path.name for path in target.parent.iterdir()] == ["my adapter"]
    (tmp_path / "link").symlink_to(target)
    for name in ("~/new/my adapter", tmp_path / "new" / ".." / "link", f"{target}/"):
        assert lora.load(name)[1] == {"language_model": Lora(2)}
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(checkpoint.CheckpointError, match="dangling exists already"):
        lora.save(tmp_path / "dangling", adapters, {"language_model": Lora(2)})
    monkeypatch.setattr(checkpoint, "save", fails_as_full)
    with pytest.raises(checkpoint.CheckpointError, match=r"the disk of .* is full, nothing was kept"):
        lora.save(target.with_name("other"), adapters, {"language_model": Lora(2)})
    assert [path.name for path in target.parent.iterdir()] == ["my adapter"]


def fails_as_full(*_):
    raise OSError(28, "No space left on device")


def test_layouts_follow_the_kernels():
    config = tiny()
    specs = param_sharding.param_specs(adapters_of(random_params(config)))
    attention = specs["language_model"]["layers"]["self_attn"]
    assert attention["q_proj"] == {"lora_a": P(None, "fsdp", None), "lora_b": P(None, None, "tensor", None)}
    assert attention["o_proj"] == {"lora_a": P(None, "tensor", None, None), "lora_b": P(None, None, "fsdp")}
    assert specs["vision_model"]["layers"]["attn"]["qkv"]["lora_b"] == P(None, None, None, "tensor", None)


# Recipes.


def test_recipes_are_consistent():
    assert train.RECIPES.replace(" or", ",").split(", ") == list(recipes.RECIPES)  # the help names them all
    for name, recipe in recipes.RECIPES.items():
        assert recipe.name == name
        assert recipes.recipe_of(name) is recipe
        frozen_tower = "vision_model" not in recipe.train
        assert not (frozen_tower and recipe.drop_path), name
    with pytest.raises(ValueError, match="recipe 'stage3' is not known: stage1, stage2"):
        recipes.recipe_of("stage3")
    with pytest.raises(LoraError, match="language_model: train a part itself or its adapters, not both"):
        dataclasses.replace(recipes.LORA, train=("language_model",))
    with pytest.raises(ValueError, match="trains nothing"):
        dataclasses.replace(recipes.LORA, lora={})


def test_resized_tower_sees_as_the_reference_would_have_it_see():
    """The forward pass resizes positions on the fly as the reference does; resized for good it is the same tower."""
    config = tiny()
    params = random_params(config)
    resized = resizing.resized_config(config, 168)
    larger = resizing.resize_tower(params, config, resized)
    assert resized.vision.image_size == resized.image_size == 168
    assert larger["vision_model"]["embeddings"]["position_embedding"].shape == (145, 120)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 168, 168)).astype(np.float32)
    tower = jax.jit(modules.run_tower, static_argnames=("config",))
    on_the_fly, _ = tower(params["vision_model"], config.vision, pixels)
    for_good, _ = tower(larger["vision_model"], resized.vision, pixels)
    assert_close(for_good, on_the_fly, 1e-5, "hidden states")
    with pytest.raises(ValueError, match="patches per side"):
        resizing.resized_config(config, 126)


# peft.


def logits_of(variables, config, ids):
    return jax.device_get(jax.jit(lambda variables: InternVLChat(config).apply(variables, ids))(variables))


def test_llama_adapters_equal_pefts_both_ways(tmp_path):
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    from checkpoints_convert.adapters.peft_adapters import export_peft, import_peft

    model = llama(transformers)
    config = config_from_hf(model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    params = torch_tree(config, model)
    settings = {"language_model": Lora(3, alpha=5, dropout=0.1)}
    adapters = adapters_of(params, settings, 0.2)
    ids = np.random.default_rng(0).integers(3, 91, (2, 20))

    export_peft(tmp_path / "ours", adapters, settings, config)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "ours" / "language_model").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    ours = logits_of(lora.attach(params, adapters, settings), config, ids)
    assert np.abs(ours - logits_of({"params": params}, config, ids)).max() > 0.1
    assert_close(ours, expected, 1e-3, "unmerged logits")
    merged = {"params": lora.merge(params, adapters, settings)}
    assert_close(logits_of(merged, config, ids), expected, 1e-3, "merged logits")

    theirs.save_pretrained(tmp_path / "theirs" / "language_model")
    again, read = import_peft(tmp_path / "theirs", config)
    assert read == settings
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    merged = torch_tree(config, theirs.merge_and_unload())
    own = lora.merge(params, adapters, settings)
    for name in ("q_proj", "o_proj"):
        kernels = (tree["language_model"]["layers"]["self_attn"][name]["kernel"] for tree in (own, merged))
        assert_close(*kernels, 1e-5, f"merged {name}")


def test_tower_adapters_in_pefts_layout(tmp_path):
    """Layers past select_layer have none; peft's names are those of the reference's own modules."""
    pytest.importorskip("torch")  # of the extra 'convert'
    from checkpoints_convert.adapters.peft_adapters import export_peft, import_peft
    from checkpoints_convert.mapping import ConversionError
    from checkpoints_convert.readers import Weights

    config = tiny()
    params = random_params(config)
    assert config.num_vision_layers < config.vision.num_hidden_layers
    adapters = adapters_of(params)
    export_peft(tmp_path / "out", adapters, BOTH, config)
    written = Weights(tmp_path / "out" / "vision_model", ["adapter_model.safetensors"], None)
    name = "base_model.model.encoder.layers.0.attn.qkv.lora_A.weight"
    assert written.shapes[name] == (2, 120)
    assert_close(written.read(name), np.asarray(adapters["vision_model"]["layers"]["attn"]["qkv"]["lora_a"][0]).T, 0)
    assert len(written.shapes) == config.num_vision_layers * 8
    again, settings = import_peft(tmp_path / "out", config)
    assert settings == {**BOTH, "language_model": Lora(4, alpha=8, dropout=0.0)}
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    with pytest.raises(ConversionError, match="exists already"):
        export_peft(tmp_path / "out", adapters, BOTH, config)
    with pytest.raises(ConversionError, match=r"down_proj.lora_A.weight is \(4, 352\), the model asks for \(4, 64\)"):
        import_peft(tmp_path / "out", tiny(intermediate_size=64))
