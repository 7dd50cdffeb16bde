"""peft's adapters: every kind that is read gives peft's own numbers, every other is refused by name."""

import copy
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from support.adapter_cases import PLAIN_LORA, adapters_of, llama
from support.golden import DATA, assert_close, torch_tree
from support.tiny_model import random_params, tiny

torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
from safetensors.torch import load_file, save_file  # noqa: E402
from support import modules  # noqa: E402

from checkpoints_convert.adapters import peft_config  # noqa: E402
from checkpoints_convert.adapters.peft_adapters import CONFIG, PICKLE, WEIGHTS, export_peft, import_peft  # noqa: E402
from checkpoints_convert.mapping import ConversionError  # noqa: E402
from internvl_jax import checkpoint, lora  # noqa: E402
from internvl_jax.cli import main  # noqa: E402
from internvl_jax.config import ChatConfig, config_from_hf, load_config  # noqa: E402
from internvl_jax.inference.loading import NANO  # noqa: E402
from internvl_jax.lora import Lora  # noqa: E402
from internvl_jax.utils import files  # noqa: E402


@dataclasses.dataclass
class Base:
    """A tiny LLaMA: torch's module, our parameters and the logits of both."""

    model: object
    config: ChatConfig
    params: dict
    ids: np.ndarray
    logits: np.ndarray

    def fresh(self):
        return copy.deepcopy(self.model)

    def ours(self, directory):
        """Our logits with the adapter of a directory, merged: one compiled program for all of them."""
        adapters, settings = import_peft(directory, self.config)
        lora.check(self.params, adapters)
        return logits(self.merged(adapters, settings), self.config, self.ids)

    def merged(self, adapters, settings):
        return jax.device_get(lora.merge(self.params, adapters, settings))

    def theirs(self, model):
        with torch.no_grad():
            return model.eval()(torch.tensor(self.ids)).logits.numpy()


@pytest.fixture(scope="module")
def base():
    model = llama(transformers)
    config = config_from_hf(model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    params = torch_tree(config, model)
    ids = np.random.default_rng(0).integers(3, 91, (2, 20))
    return Base(model, config, params, ids, np.asarray(logits(params, config, ids)))


def logits(params, config, ids):

    global _program
    _program = _program or jax.jit(lambda params, ids: modules.forward(params, config, ids)[0])
    return jax.device_get(_program(params, ids))


_program = None


def trained(model, size=0.2, seed=1):
    """Numbers in every matrix of an adapter, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, values in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            values.data += size * torch.randn(values.shape, generator=generator)
    return model


def write_plain(directory, base, change=None, **fields):
    """An adapter of r 4 on q_proj and down_proj, `fields` in its configuration, its tensors passed through `change`."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    sizes = {"self_attn.q_proj": (48, 48), "mlp.down_proj": (80, 48)}
    tensors = {}
    for layer in range(2):
        for name, (inputs, outputs) in sizes.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = 0.2 * torch.randn(4, inputs, generator=generator)
            tensors[f"{key}.lora_B.weight"] = 0.2 * torch.randn(outputs, 4, generator=generator)
    if change is not None:
        tensors = change(tensors) or tensors
    save_file(tensors, directory / WEIGHTS)
    written = {name: value for name, value in {**PLAIN_LORA, **fields}.items() if value is not ...}
    (directory / CONFIG).write_text(json.dumps(written))
    return directory


ACCEPTED = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 5},
    "patterns": {
        "rank_pattern": {r"layers\.0\.self_attn\.[qk]_proj": 2, "down_proj": 6},
        "alpha_pattern": {r".*\.1\..*v_proj": 3, "model.layers.0.mlp.down_proj": 1.5},
        "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
    },
    "alternatives": {"rank_pattern": {"down_proj|q_proj": 3}, "alpha_pattern": {"model.layers.0.*|q_proj": 9}},
    "rslora_and_patterns": {"use_rslora": True, "rank_pattern": {"^model.layers.1.self_attn.q_proj": 7}},
    "regex": {"target_modules": r".*\.1\.(self_attn|mlp)\.(o_proj|up_proj)"},
    "all_linear": {"target_modules": "all-linear"},
    "full_names": {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.0.mlp.gate_proj"]},
    "some_layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "one_layer": {"layers_to_transform": 0},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "model.layers.0.mlp.up_proj"]},
    "excluded_by_regex": {"exclude_modules": r".*layers\.0\..*q_proj"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    "random": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
    "mica": {"init_lora_weights": "mica"},
    "velora": {"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)}
    if hasattr(peft.tuners.lora.config, "VeloraConfig")
    else {},
    "saved_modules": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "empty": {"modules_to_save": [], "exclude_modules": [], "layers_to_transform": [], "alora_invocation_tokens": []},
}


@pytest.mark.parametrize("fields", ACCEPTED.values(), ids=ACCEPTED)
def test_equal_to_peft_whatever_the_adapter(base, tmp_path, fields):
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **fields}
    written = trained(peft.get_peft_model(base.fresh(), peft.LoraConfig(**fields)))
    written.save_pretrained(tmp_path)
    expected = base.theirs(peft.PeftModel.from_pretrained(base.fresh(), tmp_path))
    assert np.abs(expected - base.logits).max() > 0.1
    assert_close(base.ours(tmp_path), expected, 1e-3, "logits")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_what_changes_the_base_is_refused_until_it_is_converted(base, tmp_path, init):
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    model = peft.get_peft_model(base.fresh(), config)
    model.save_pretrained(tmp_path / "initial")
    trained(model, 0.05)
    model.save_pretrained(tmp_path / "as_it_is")
    with pytest.raises(
        ConversionError, match=f"init_lora_weights = '{init}'.*path_initial_model_for_weight_conversion"
    ):
        import_peft(tmp_path / "as_it_is", base.config)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert_close(base.ours(tmp_path / "plain"), base.theirs(model), 1e-3, "logits")


REFUSED = {
    "use_dora": True,
    "alora_invocation_tokens": [5, 6],
    "layer_replication": [[0, 2], [0, 2]],
    "lora_bias": True,
    "target_parameters": ["model.layers.0.mlp"],
    "use_qalora": True,
    "trainable_token_indices": [1, 2],
    "megatron_config": {"a": 1},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 0.1},
    "monteclora_config": {"a": 1},
    "enable_lora": [True, False, True],
    "bias": "lora_only",
    "peft_type": "ADALORA",
    "init_lora_weights": "loftq",
    "modules_to_save": ["lm_head"],
    "a_field_of_next_year": True,
    "r": "4",
    "lora_alpha": None,
    "rank_pattern": {"(q_proj": 4},
    "alpha_pattern": {"q_proj": float("nan")},
    "target_modules": "(",
    "lora_dropout": 1.5,
    "use_rslora": "yes",
    "layers_to_transform": ["0"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_is_refused_by_name(base, tmp_path, name):
    write_plain(tmp_path / "adapter", base, **{name: REFUSED[name]})
    with pytest.raises(ConversionError, match=name):
        import_peft(tmp_path / "adapter", base.config)


def test_every_field_of_pefts_configuration_is_known():
    known = {*peft_config.PeftConfig.__dataclass_fields__, *peft_config.HARMLESS_FIELDS, *peft_config.REFUSED_FIELDS}
    theirs = {one.name for one in dataclasses.fields(peft.LoraConfig)}
    assert theirs <= known | {"peft_type", "bias", "init_lora_weights"}


def test_odd_files_of_plain_adapters(base, tmp_path, logged):
    expected = base.ours(write_plain(tmp_path / "plain", base))
    assert np.abs(expected - base.logits).max() > 0.1
    nothing = dict.fromkeys(("modules_to_save", "layer_replication", "loftq_config", "rank_pattern", "layers_pattern"))
    assert_close(base.ours(write_plain(tmp_path / "null", base, **nothing, use_dora=False, unheard_of=[])), expected, 0)
    assert_close(base.ours(write_plain(tmp_path / "alpha", base, lora_alpha=...)), expected, 0)  # 8 is the default
    assert_close(base.ours(write_plain(tmp_path / "nought", base, lora_alpha=0)), base.logits, 0)
    with pytest.raises(ConversionError, match=r"q_proj.lora_A.weight is \(4, 48\), the model asks for \(8, 48\)"):
        base.ours(write_plain(tmp_path / "r", base, r=...))
    assert not logged

    pickled = write_plain(tmp_path / "pickled", base)
    torch.save(load_file(pickled / WEIGHTS), pickled / PICKLE)
    (pickled / "README.md").write_text("hello")
    (pickled / "extra_head.bin").write_bytes(b"1")
    assert_close(base.ours(pickled), expected, 0)
    assert logged == [f"{pickled}: not read: {PICKLE}, extra_head.bin"]
    (pickled / WEIGHTS).unlink()
    assert_close(base.ours(pickled), expected, 0)
    (pickled / PICKLE).write_bytes((pickled / PICKLE).read_bytes()[:-700])
    with pytest.raises(ConversionError, match=f"{PICKLE} is truncated or damaged"):
        base.ours(pickled)
    (pickled / PICKLE).unlink()
    with pytest.raises(ConversionError, match=f"has neither {WEIGHTS} nor {PICKLE}"):
        base.ours(pickled)
    (pickled / CONFIG).write_bytes(b"{")
    with pytest.raises(ValueError, match=f"{CONFIG} is not readable JSON"):
        base.ours(pickled)

    bfloat16 = write_plain(tmp_path / "bf16", base, lambda ts: {name: one.bfloat16() for name, one in ts.items()})
    theirs = peft.PeftModel.from_pretrained(base.fresh(), bfloat16)
    assert_close(base.ours(bfloat16), base.theirs(theirs), 1e-3, "logits of bfloat16")


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): values for key, values in tensors.items()}


def with_value(value):
    def change(tensors):
        tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][3, 1] = value

    return change


def added(name, *shape):
    return lambda tensors: {**tensors, f"base_model.model.{name}": torch.ones(shape)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_value(float("nan")), r"1.mlp.down_proj.lora_B.weight holds NaN or infinite values"),
        (with_value(float("-inf")), r"1.mlp.down_proj.lora_B.weight holds NaN or infinite values"),
        (lambda ts: {k: v.to(torch.int8) for k, v in ts.items()}, "lora_A.weight is int8: adapters are read in"),
        (lambda ts: dict(list(ts.items())[:-2]), r"missing: model.layers.1.mlp.down_proj.lora_A.weight"),
        (lambda ts: dict(list(ts.items())[:-1]), r"1.mlp.down_proj.lora_B.weight is missing, the model asks for"),
        (renamed("q_proj", "k_proj"), r"model.layers.0.self_attn.k_proj has an adapter, but .* selects other layers"),
        (renamed("layers.1", "layers.7"), r"layers.7.self_attn.q_proj.lora_A.weight, no layer of the model"),
        (renamed(".weight", ".default.weight"), "the name of an adapter is in it"),
        (added("model.embed_tokens.lora_embedding_A", 4, 91), "lora_embedding_A, an adapter of an embedding"),
        (added("model.layers.0.self_attn.q_proj.lora_magnitude_vector", 48), "which DoRA has"),
        (added("model.layers.0.self_attn.q_proj.lora_B.bias", 48), "a bias of an adapter"),
        (added("model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 48), "rows of an embedding"),
        (added("lm_head.weight", 95, 48), r"lm_head.weight is \(95, 48\), the model asks for \(91, 48\)"),
        (added("model.layers.0.input_layernorm.weight", 48), "has no place beside adapters of this model"),
        (
            lambda ts: {**ts, **{key.replace("model.model.", "model."): one.clone() for key, one in ts.items()}},
            "layers.1.mlp.down_proj is there twice, under two names",
        ),
        (added("lm_head.lora_A.weight", 4, 48), "lm_head.lora_A.weight, no layer of the model that adapters go to"),
    ],
)  # fmt: skip
def test_tensors_that_nothing_takes_are_named(base, tmp_path, change, message):
    write_plain(tmp_path / "adapter", base, change)
    with pytest.raises(ConversionError, match=message):
        import_peft(tmp_path / "adapter", base.config)


def test_where_adapters_lie(base, tmp_path):
    expected = base.ours(write_plain(tmp_path / "plain", base))
    shutil.copytree(tmp_path / "plain", tmp_path / "towers" / "language_model")
    assert_close(base.ours(tmp_path / "towers"), expected, 0)
    shutil.copytree(tmp_path / "plain", tmp_path / "named" / "my_adapter")  # save_pretrained with an adapter's name
    with pytest.raises(ConversionError, match=r"has none of adapter_config.json, .*pass .*named/my_adapter$"):
        base.ours(tmp_path / "named")
    shutil.copytree(tmp_path / "plain", tmp_path / "plain" / "language_model")
    with pytest.raises(ConversionError, match="is an adapter, and so is language_model/ in it"):
        base.ours(tmp_path / "plain")
    with pytest.raises(ConversionError, match="nowhere does not exist"):
        base.ours(tmp_path / "nowhere")
    with pytest.raises(ConversionError, match="is a file"):
        base.ours(tmp_path / "towers" / "language_model" / CONFIG)


def test_writing_for_peft_is_one_process_alone(tmp_path, logged):
    config, settings = tiny(), {"language_model": Lora(2)}
    adapters = adapters_of(random_params(config), settings)
    target = tmp_path / "theirs"
    with files.claim(target), pytest.raises(files.OutputInUseError, match="theirs is being written by process"):
        export_peft(target, adapters, settings, config)
    files.temporary_path(target, 4194305).mkdir()
    export_peft(f"{tmp_path}/x/../theirs/", adapters, settings, config)
    assert len(logged) == 1
    assert "theirs.tmp-4194305, which an interrupted process left" in logged[0]
    with pytest.raises(KeyError):
        export_peft(tmp_path / "other", adapters, {}, config)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    assert import_peft(f"{tmp_path}/x/../theirs/", config)[1]["language_model"].rank == 2


def test_commands_on_paths_as_people_write_them(tmp_path, monkeypatch, capsys):
    text = load_config(NANO).text
    tensors = {}
    for layer in range(text.num_hidden_layers):
        key = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        tensors[f"{key}.lora_A.weight"] = torch.full((2, text.hidden_size), 0.1)
        tensors[f"{key}.lora_B.weight"] = torch.full((text.intermediate_size, 2), 0.1)
    peft_directory = tmp_path / "their adapter" / "language_model"
    peft_directory.mkdir(parents=True)
    save_file(tensors, peft_directory / WEIGHTS)
    (peft_directory / CONFIG).write_text(json.dumps({**PLAIN_LORA, "r": 2, "target_modules": ["up_proj"]}))
    (tmp_path / "link").symlink_to(tmp_path / "their adapter")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert main.main(["adapters", "from-peft", "../link/", "~/made/öurs"]) == 0
    assert f"{tmp_path}/made/öurs: adapters of language_model; " in capsys.readouterr().err.replace("\n", "")
    assert main.main(["adapters", "to-peft", "../made/./öurs/", "../back"]) == 0
    back = load_file(tmp_path / "back" / "language_model" / WEIGHTS)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert main.main(["adapters", "merge", "../made/öurs", "../here/../merged"]) == 0
    merged, base = (checkpoint.Reader(path) for path in (tmp_path / "merged", NANO))
    name = "language_model/layers/mlp/up_proj/kernel"
    change = np.asarray(merged.read(name), np.float32) - np.asarray(base.read(name), np.float32)
    assert_close(change, np.full_like(change, 4 * 2 * 0.1 * 0.1), 0.01, "8 / 2 times the product, in bfloat16")
    capsys.readouterr()
    with files.claim(tmp_path / "other"):
        assert main.main(["adapters", "merge", "../made/öurs", "../other"]) == 2
    assert "other is being written by process" in capsys.readouterr().err.replace("\n", " ")
    assert main.main(["adapters", "merge", "../made", "../other"]) == 2
    assert "made holds no adapter" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "back",
        "here",
        "link",
        "made",
        "merged",
        "their adapter",
    ]


def test_adapters_of_a_whole_reference_model(tmp_path):
    """One directory with the names of InternVL's own module, both towers: the same as a directory for each."""
    config = tiny()
    settings = {"language_model": Lora(4, dropout=0.0), "vision_model": Lora(4, dropout=0.0)}
    export_peft(tmp_path / "towers", adapters_of(random_params(config), settings), settings, config)
    tensors = {}
    for tower in settings:
        for key, values in load_file(tmp_path / "towers" / tower / WEIGHTS).items():
            tensors[key.replace("base_model.model.", f"base_model.model.{tower}.")] = values
    (tmp_path / "whole").mkdir()
    save_file(tensors, tmp_path / "whole" / WEIGHTS)
    pattern = r"language_model\..*_proj|vision_model\.encoder\.layers\.[0-3]\.(attn|mlp)\.(qkv|proj|fc1|fc2)"
    count = config.num_vision_layers
    pattern = pattern.replace("[0-3]", f"[0-{count - 1}]")
    (tmp_path / "whole" / CONFIG).write_text(json.dumps({**PLAIN_LORA, "target_modules": pattern}))
    apart, whole = (import_peft(tmp_path / name, config) for name in ("towers", "whole"))
    assert apart[1] == whole[1]
    jax.tree.map(np.testing.assert_array_equal, apart[0], whole[0])


def test_transformers_llava_with_adapters_everywhere(tmp_path, logged):
    """q, k and v of CLIP are one kernel here; the layers past select_layer never run."""
    directory = DATA / "llava_1_5" / "hf"
    config = load_config(directory)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    params = torch_tree(config, model)
    chosen = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "out_proj", "fc2", "up_proj"], rank_pattern={"q_proj": 2}
    )
    wrapped = trained(peft.get_peft_model(model, chosen))
    wrapped.save_pretrained(tmp_path)
    adapters, settings = import_peft(tmp_path, config)
    depth = config.num_vision_layers
    assert depth < config.vision.num_hidden_layers
    assert len(logged) == 1
    assert f"vision_model layers {depth}" in logged[0]
    ours, theirs = lora.merge(params, adapters, settings), torch_tree(config, wrapped.merge_and_unload())
    theirs["vision_model"]["layers"], ours["vision_model"]["layers"] = (
        jax.tree.map(lambda leaf: leaf[:depth], tree["vision_model"]["layers"]) for tree in (theirs, ours)
    )
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5, "merged"), jax.device_get(ours), theirs)
    before = jax.tree.map(lambda leaf: leaf[:depth], params["vision_model"]["layers"])
    assert (
        np.abs(before["attn"]["qkv"]["kernel"] - theirs["vision_model"]["layers"]["attn"]["qkv"]["kernel"]).max() > 0.01
    )
