"""From a directory to a Chat: what is read, what is refused, checkpoints with parts missing, bare towers."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support.chat_cases import ARRAYS, CHECKPOINT, PROMPTS, image_path
from support.generation_cases import LLAMA, llama_weights, torch_llama
from support.golden import DATA, assert_close, bundle

import internvl_jax
from internvl_jax.config import ConfigError, load_config
from internvl_jax.inference import loading
from internvl_jax.inference.chat import Chat
from internvl_jax.inference.generation.bound_model import bind_model
from internvl_jax.inference.generation.generator import Generator
from internvl_jax.utils import logs

pytest.importorskip("torch")  # the golden checkpoint is PyTorch's


def test_only_what_runs_is_loaded(chat):
    layers = chat.params["vision_model"]["layers"]
    assert chat.config.vision.num_hidden_layers == 6
    assert len(layers) == chat.config.num_vision_layers == 3  # hidden_states[-4]
    abstract = loading.abstract_for_running(chat.config, jnp.bfloat16)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(abstract["vision_model"]["layers"])} == {3}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(abstract["language_model"]["layers"])} == {4}
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("bfloat16")}


def test_progress_ends_at_the_whole():
    seen = []
    internvl_jax.load(CHECKPOINT, progress=lambda *step: seen.append(step))
    done, totals, what = zip(*seen)
    assert list(done) == sorted(done)
    assert done[-1] == totals[-1] > 0
    assert set(what) == {"loading"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "InternVL-Chat-V1-1"}, "InternVL-Chat-V1-1 does not exist: pass a directory on this machine"),
        ({"path": CHECKPOINT / "config.json"}, "is a file: pass the directory that holds config.json"),
        ({"path": DATA}, "config.json does not exist; a checkpoint directory needs its config.json"),
        ({"dtype": "float16"}, "dtype 'float16' is not supported: use 'float32' or 'bfloat16'"),
        ({"dtype": "half"}, "use 'float32' or 'bfloat16'"),
        ({"dtype": "fp32"}, "dtype 'fp32' is not supported"),
        ({"vision_mode": "data"}, "pass a mesh too"),
        ({"mesh": "tensor=4096"}, "needs 4096 devices"),
        ({"mesh": "tensor"}, "is not understood"),
    ],
    ids=str,
)
def test_bad_arguments(options, message, monkeypatch):
    monkeypatch.setattr(loading, "read_params", lambda *_: pytest.fail("parameters were read"))
    with pytest.raises(ValueError, match=message):
        internvl_jax.load(**{"path": CHECKPOINT, **options})


def stripped(tmp_path, *missing, source=CHECKPOINT, **changes):
    """A copy of a checkpoint without some files, and with other values in its config.json."""
    for file in source.iterdir():
        if file.name not in missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    return tmp_path


def test_paths_are_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(CHECKPOINT.parent))
    monkeypatch.chdir(CHECKPOINT / "..")
    for path in ("~/checkpoint", "checkpoint/../checkpoint/", "./checkpoint"):
        monkeypatch.setattr(loading, "load_params", lambda directory, *_: directory)
        assert internvl_jax.load(path).params == CHECKPOINT
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"weights\.bin is a file: pass the directory"):
        load_config(tmp_path / "weights.bin")


def test_without_tokenizer_files_arrays_still_run(tmp_path):
    tokenizer = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    bare = internvl_jax.load(stripped(tmp_path, *tokenizer))
    prompt = PROMPTS["text_only"]
    assert bare.generate(prompt["input_ids"], max_new_tokens=4).tolist() == [prompt["generated_ids"][:4]]
    with pytest.raises(ValueError, match=r"has no tokenizer files: put them beside its config\.json"):
        bare.chat("Hello")
    with pytest.raises(ValueError, match="this model has no image token"):
        bare.generate([[862] * 16], ARRAYS["images/rgb/quickstart"][None])


def test_without_image_processor_text_still_runs(tmp_path):
    blind = internvl_jax.load(stripped(tmp_path, "preprocessor_config.json"))
    prompt = PROMPTS["text_only"]
    assert blind.chat(prompt["question"], max_new_tokens=32).text == prompt["response"]
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json: put it beside its config"):
        blind.chat("What?", image_path("rgb"))


def test_unknown_template(tmp_path):
    chat = internvl_jax.load(stripped(tmp_path, template="vicuna_v7"))
    with pytest.raises(ValueError, match=r"'vicuna_v7', and the known ones are .*internvl_zh.*: set `template`"):
        chat.chat("Hello")


def test_generation_config_names_the_end_tokens(tmp_path):
    """transformers prefers generation_config.json to config.json; so do chat and generate."""
    free = PROMPTS["text_only"]["generated_ids"]
    directory = stripped(tmp_path)
    for eos, length in (([2, free[5]], 6), (free[2], 3)):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        chat = internvl_jax.load(directory)
        reply = chat.chat(PROMPTS["text_only"]["question"], max_new_tokens=32)
        assert (len(reply.tokens), reply.finish_reason) == (length, "stop")
        assert chat.generate(PROMPTS["text_only"]["input_ids"], max_new_tokens=32).shape == (1, length)
        own = chat.chat(PROMPTS["text_only"]["question"], max_new_tokens=32, eos_token_ids=(free[7],))
        assert len(own.tokens) == 8
    (directory / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ConfigError, match=r"generation_config\.json has eos_token_id '</s>': a token id or a list"):
        internvl_jax.load(directory)


# Bare towers.


@pytest.mark.parametrize("layout", ["checkpoint_bin", "checkpoint_safetensors"])
def test_bare_vision_tower(layout):
    arrays, _ = bundle("intern_vit")
    tower = internvl_jax.load(DATA / "intern_vit" / layout)
    assert_close(tower.encode(arrays["pixel_values"]), arrays["last_hidden_state"], 1e-3, "last hidden state")
    with Image.open(DATA / "intern_vit" / "images" / "rgb.png") as image:
        np.testing.assert_array_equal(tower.processor(image), arrays["pixel_values"][0])
    if layout == "checkpoint_bin":  # other sizes than the trained one, remainders included
        for name in ("interp_up_168", "interp_down_70", "interp_rect_84x140", "interp_remainder_177"):
            encoded = tower.encode(arrays[f"{name}/pixel_values"])
            assert_close(encoded[0], arrays[f"{name}/last_hidden_state"], 1e-3, name)
    for call in (lambda: tower.chat("Hello"), lambda: tower.stream("Hello"), lambda: tower.generate([[1]])):
        with pytest.raises(ValueError, match="is a vision tower without a language model: it can only `encode`"):
            call()
    with pytest.raises(ValueError, match="without a language model"):
        tower.logits([[1]])


def test_bare_language_model(tmp_path):
    """A plain LlamaForCausalLM as transformers saves it, against transformers."""
    import torch

    reference = torch_llama(llama_weights(5))
    reference.generation_config.update(eos_token_id=[2, 9], pad_token_id=LLAMA["pad_token_id"])
    reference.save_pretrained(tmp_path)
    language = internvl_jax.load(tmp_path)
    ids, mask = np.array([[0, 0, 4, 5, 6], [7, 8, 3, 10, 11]]), np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        positions = torch.from_numpy(np.maximum(mask.cumsum(axis=1) - 1, 0))
        logits = reference(**inputs, position_ids=positions).logits.numpy()
        tokens = reference.generate(**inputs, max_new_tokens=20, do_sample=False)[:, 5:].numpy()
    assert_close(language.logits(ids, attention_mask=mask)[mask > 0], logits[mask > 0], 1e-3, "logits")
    np.testing.assert_array_equal(language.generate(ids, attention_mask=mask, max_new_tokens=20), tokens)
    assert language.eos_token_ids == (2, 9)
    with pytest.raises(ValueError, match="has no tokenizer files"):
        language.chat("Hello")
    for call in (language.encode, lambda pixels: language.generate([[1]], pixels)):
        with pytest.raises(ValueError, match="without a vision tower: it reads no images"):
            call(np.zeros((1, 3, 112, 112), np.float32))


def test_bare_language_model_that_chats(chat):
    """With a tokenizer and a template a model without a tower answers, and says that it cannot see."""
    config = replace(chat.config, vision=None, projector=None)
    params = {"language_model": chat.params["language_model"]}
    generator = Generator.for_tokenizer(bind_model(config, params, dtype=jnp.float32), chat.tokenizer)
    blind = Chat(generator, chat.tokenizer)
    prompt = PROMPTS["text_only"]
    assert blind.chat(prompt["question"], max_new_tokens=32).text == prompt["response"]
    with pytest.raises(ValueError, match="is a language model without a vision tower: ask without images"):
        blind.chat("What?", image_path("rgb"))


def test_the_compilation_cache_where_it_can_be_written_and_where_not(tmp_path, monkeypatch, logged):
    before = jax.config.values["jax_compilation_cache_dir"]
    seconds = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    logs.warn_once.cache_clear()
    (tmp_path / "file").touch()
    try:
        for home, expected in (
            (tmp_path / "file", None),
            (tmp_path / "file", None),
            (tmp_path / "cache", tmp_path / "cache/internvl_jax/xla"),
            (tmp_path / "other", tmp_path / "cache/internvl_jax/xla"),  # what is set stays
        ):
            if expected is None:
                jax.config.update("jax_compilation_cache_dir", None)
            monkeypatch.setenv("XDG_CACHE_HOME", str(home))
            loading.enable_compilation_cache()
            found = jax.config.values["jax_compilation_cache_dir"]
            assert found == (None if expected is None else str(expected))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    assert len(logged) == 1
    assert f"the cache {tmp_path}/file/internvl_jax cannot be used (Not a directory): compiled programs" in logged[0]
