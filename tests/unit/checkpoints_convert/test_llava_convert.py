"""LLaVA's layouts: converted, loaded, exported, with the vision tower inside and apart; chat on them."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.published import CLIP, with_tower

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from support.golden import bundle  # noqa: E402
from support.llava_cases import LLAVA, V1_0, expand  # noqa: E402
from support.published import assert_same_bits, state_of  # noqa: E402

import internvl_jax  # noqa: E402
from checkpoints_convert.convert import convert, load_hf  # noqa: E402
from checkpoints_convert.export import export  # noqa: E402
from checkpoints_convert.mapping import TOWER, ConversionError  # noqa: E402
from internvl_jax import checkpoint  # noqa: E402
from internvl_jax.config import ConfigError, load_config  # noqa: E402
from internvl_jax.models import chat_model  # noqa: E402
from internvl_jax.processing.images import load_image  # noqa: E402

TEXT_HALF = ("text_model.", "text_projection", "visual_projection", "logit_scale")


def abstract(config):
    return chat_model.abstract_params(config, jnp.float32)


def assert_equal(ours, theirs):
    for (name, a), (_, b) in zip(checkpoint.named_leaves(ours), checkpoint.named_leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


def sized(directory, source, size):
    """A copy of a V1-0 checkpoint whose images are smaller than its name says."""
    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "force_image_size": size}))
    return directory


# There and back.


@pytest.mark.parametrize("name", ["internvl_chat_v1_0", "llava_hf"])
@pytest.mark.parametrize("safe", [None, True], ids=["as published", "safetensors"])
def test_there_and_back(name, safe, tmp_path):
    source = V1_0 / "checkpoint" if name == "internvl_chat_v1_0" else LLAVA / "hf"
    config, state = load_config(source), state_of(source)
    report = convert(source, tmp_path / "ours")
    assert report.tensors == len(state)
    assert load_config(tmp_path / "ours") == config
    params = load_hf(source, abstract(config))
    assert_equal(checkpoint.load(tmp_path / "ours", abstract(config)), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(checkpoint.stored_tree(tmp_path / "ours"))} == {
        jnp.dtype("bfloat16" if name == "internvl_chat_v1_0" else "float16")
    }
    export(tmp_path / "ours", tmp_path / "back", safe_serialization=safe)
    assert_same_bits(state_of(tmp_path / "back"), state)
    files = set(os.listdir(source)) | ({"InternViT-6B-224px"} if name == "internvl_chat_v1_0" else set())
    if safe is None:
        assert set(os.listdir(tmp_path / "back")) == files
    assert load_config(tmp_path / "back") == config
    assert_equal(load_hf(tmp_path / "back", abstract(config)), params)


def test_tower_apart_there_and_back(tmp_path):
    """The tower's tensors come from its directory and go back into one of its name, the text half of CLIP does not."""
    source = LLAVA / "original"
    config = load_config(source)
    state = state_of(source)
    tower = {key: values for key, values in state_of(LLAVA / CLIP).items() if not key.startswith(TEXT_HALF)}
    report = convert(source, tmp_path / "ours")
    assert report.tensors == len(state) + len(tower)
    assert load_config(tmp_path / "ours") == config  # which needs nothing beside it
    params = load_hf(source, abstract(config))
    assert_equal(checkpoint.load(tmp_path / "ours", abstract(config)), params)
    export(tmp_path / "ours", tmp_path / "back")
    assert_same_bits(state_of(tmp_path / "back"), state)
    assert_same_bits(state_of(tmp_path / "back" / CLIP), tower)
    assert set(os.listdir(tmp_path / "back")) == {*os.listdir(source), CLIP}
    assert set(os.listdir(tmp_path / "back" / CLIP)) == set(os.listdir(LLAVA / CLIP))
    for path in (tmp_path / "back").glob("**/*.json"):
        original = (source if path.parent.name == "back" else LLAVA / CLIP) / path.name
        if "index" not in path.name:
            assert path.read_bytes() == original.read_bytes(), path
    back = json.loads((tmp_path / "back" / "pytorch_model.bin.index.json").read_text())
    assert back["weight_map"] == json.loads((source / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert_equal(load_hf(tmp_path / "back", abstract(config)), params)


def test_tower_inside(tmp_path):
    """A re-saved LLaVA holds its tower: the directory beside it gives the configuration only."""
    shutil.copytree(LLAVA / CLIP, tmp_path / CLIP, ignore=shutil.ignore_patterns("*.bin"))
    source = with_tower(tmp_path / "llava")
    config, state = load_config(source), state_of(source)
    params = load_hf(source, abstract(config))
    assert_equal(params, load_hf(LLAVA / "original", abstract(config)))
    convert(source, tmp_path / "ours")
    for safe in (None, True):
        export(tmp_path / "ours", tmp_path / f"back{safe}", safe_serialization=safe)
        assert_same_bits(state_of(tmp_path / f"back{safe}"), state)


def test_export_of_what_never_was_published(tmp_path):
    """Trained parameters, without published.json: everything in the main directory, as LLaVA re-saves it."""
    source = LLAVA / "original"
    config = load_config(source)
    convert(source, tmp_path / "ours")
    for file in (tmp_path / "ours").glob("published*"):
        file.unlink()
    export(tmp_path / "ours", tmp_path / "back")
    assert sorted(path.name for path in (tmp_path / "back").glob("*.bin")) == ["pytorch_model.bin"]
    assert not list((tmp_path / "back" / CLIP).glob("*.bin"))
    assert_equal(load_hf(tmp_path / "back", abstract(config)), load_hf(source, abstract(config)))


def test_names_of_transformers_5(tmp_path):
    """What transformers saves today reads as what it saved two years ago."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(LLAVA / "hf", dtype=torch.float16)
    model.save_pretrained(tmp_path / "again")
    config = load_config(tmp_path / "again")
    assert config.text == load_config(LLAVA / "hf").text
    params = load_hf(tmp_path / "again", abstract(config))
    assert_equal(params, load_hf(LLAVA / "hf", abstract(config)))
    # And it reads what we write.
    convert(LLAVA / "hf", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    back = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "back", dtype=torch.float16)
    assert_same_bits(back.state_dict(), model.state_dict())


def test_what_is_missing_is_listed(tmp_path):
    tower = tmp_path / CLIP
    shutil.copytree(LLAVA / CLIP, tower)
    shutil.copytree(LLAVA / "original", tmp_path / "llava")
    state = state_of(tower)
    del state["vision_model.pre_layrnorm.bias"]
    state["vision_model.surplus"] = torch.zeros(3)
    torch.save(state, tower / "pytorch_model.bin")
    with pytest.raises(ConversionError) as error:
        convert(tmp_path / "llava", tmp_path / "ours")
    assert f"missing: {TOWER}vision_model.pre_layrnorm.bias [64]" in str(error.value)
    assert f"unexpected: {TOWER}vision_model.surplus [3]" in str(error.value)
    (tower / "pytorch_model.bin").unlink()
    with pytest.raises(ConversionError, match=f"{CLIP} has no weights"):
        convert(tmp_path / "llava", tmp_path / "ours")
    shutil.rmtree(tower)
    with pytest.raises(ConfigError, match="published separately: put its directory"):
        internvl_jax.load(tmp_path / "llava")
    assert not (tmp_path / "ours").exists()


# Answers.


def answers(chat, bundle_directory, cases, facts):
    for case in cases:
        *turns, question = case["messages"]
        images = [bundle_directory / facts["images"][name]["file"] for name in case["images"]]
        history = list(zip(turns[::2], turns[1::2]))
        reply = chat.chat(question, images, history, honor_exif=False, max_new_tokens=32)
        assert reply.tokens == case["generated_ids"], case["id"]
        assert reply.text == case["response"].strip(), case["id"]
        assert reply.finish_reason == ("stop" if case["finished_by_eos"] else "length")


@pytest.mark.parametrize("resolution", ["r1", "r2"])
def test_golden_answers_of_internvl_chat_v1_0(resolution, tmp_path):
    """Images and questions in, the original's greedy tokens and text out, from the published directory."""
    _, facts = bundle("internvl_chat_v1_0")
    shutil.copytree(V1_0 / "InternViT-6B-224px", tmp_path / "InternViT-6B-224px")
    chat = internvl_jax.load(sized(tmp_path / "v1_0", V1_0 / "checkpoint", facts["config"][resolution]))
    cases = [case for case in facts["prompts"] if case["resolution"] == resolution]
    assert len(cases) == {"r1": 5, "r2": 2}[resolution]
    answers(chat, V1_0, cases, facts)


@pytest.mark.parametrize("converted", [False, True], ids=["published", "converted"])
def test_golden_answers_of_llava(converted, tmp_path):
    _, facts = bundle("llava_1_5")
    source = LLAVA / "original"
    if converted:
        convert(source, tmp_path / "ours")
        source = tmp_path / "ours"
    answers(internvl_jax.load(source), LLAVA, facts["orig_prompts"], facts)


def test_golden_answers_of_transformers_layout():
    _, facts = bundle("llava_1_5")
    chat = internvl_jax.load(LLAVA / "hf")
    for case in facts["hf_prompts"]:
        files = [LLAVA / facts["images"][name]["file"] for name in case["images"]]
        pixels = np.stack([chat.processor(load_image(file, honor_exif=False)) for file in files])
        ids = np.array([expand(row, 36, 860) for row in case["input_ids"]])
        generated = chat.generate(ids, pixels, ids != 861, max_new_tokens=32)
        for row, expected in zip(generated.tolist(), case["generated_ids"]):
            assert row[: len(expected)] == expected


def test_a_batch_and_a_stream_say_what_single_questions_say():
    chat = internvl_jax.load(LLAVA / "original")
    paths = [LLAVA / "images" / name for name in ("rgb.png", "gray.png")]
    questions, images = ["What is it?", "Hello", "<image> and <image>?"], [paths[:1], [], paths]
    options = {"max_new_tokens": 8}
    batch = chat.batch_chat(questions, images, **options)
    for question, shown, reply in zip(questions, images, batch):
        assert chat.chat(question, shown, **options).tokens == reply.tokens
    stream = chat.stream(questions[0], images[0], **options)
    assert "".join(stream) == batch[0].text


def test_tokens_outside_the_vocabulary_are_still_refused():
    chat = internvl_jax.load(LLAVA / "original")
    for token in (-201, -1, 860):
        with pytest.raises(ValueError, match=f"token {token} at position 1 is outside the vocabulary of 860 tokens"):
            chat.logits(np.array([[1, token]]))
    with pytest.raises(ValueError, match=r"1 image tokens \(id -200"):
        chat.logits(np.array([[1, -200]]))
