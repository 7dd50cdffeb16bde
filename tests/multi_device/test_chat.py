"""The golden checkpoint loaded onto meshes of eight devices."""

import json
import shutil

import jax
import numpy as np
import pytest
from support.golden import DATA, assert_close, bundle
from support.llava_cases import LLAVA, V1_0

import internvl_jax
from internvl_jax import checkpoint
from internvl_jax.cli import main
from internvl_jax.inference import loading
from internvl_jax.models import param_sharding
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.parallel.mesh import make_mesh

CHECKPOINT = DATA / "internvl_chat_v1_1" / "checkpoint"
ARRAYS, FACTS = bundle("internvl_chat_v1_1")
REFERENCE = {"honor_exif": False, "image_path": "native", "max_new_tokens": 32}


CUT_OFF = "(cut off after 32 tokens: --max-new-tokens allows more)\n"
PROMPTS = {prompt["id"]: prompt for prompt in FACTS["prompts"]}


def asked(name):
    """question, images, history of a golden prompt."""
    prompt = PROMPTS[name]
    images = [DATA / "internvl_chat_v1_1" / FACTS["images"][image]["file"] for image in prompt["images"]]
    return prompt["question"], images, [tuple(turn) for turn in prompt["history"] or ()]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The golden checkpoint in this project's format: another way in, the same shards."""
    from checkpoints_convert.convert import convert

    directory = tmp_path_factory.mktemp("converted") / "golden"
    convert(CHECKPOINT, directory)
    return directory


@pytest.mark.parametrize(
    ("source", "spec", "vision"),
    [
        ("published", "data=2,tensor=4", None),
        ("converted", {"fsdp": 4, "tensor": 2}, "data"),
    ],
)
def test_answers_and_shares(source, spec, vision, converted, monkeypatch):
    read = []
    place = param_sharding.place_params
    monkeypatch.setattr(
        param_sharding, "place_params", lambda params, *a, **k: place(read.append(shares(params)) or params, *a, **k)
    )
    directory = converted if source == "converted" else CHECKPOINT
    chat = internvl_jax.load(directory, mesh=spec, vision_mode=vision)
    mesh = make_mesh(spec)
    mode = vision or ("data" if mesh.shape["tensor"] == 1 else "tensor")
    assert chat.generator.mesh.shape == mesh.shape

    # What was read lay on its storage shardings from the first byte on: no device ever held more.
    abstract = loading.abstract_for_running(chat.config, np.float32)
    expected = param_sharding.storage_shardings(abstract, mesh, vision=mode)
    jax.tree.map(
        lambda leaf, place, share: np.testing.assert_array_equal(share, place.shard_shape(leaf.shape)),
        abstract,
        expected,
        jax.tree.unflatten(jax.tree.structure(abstract), read[0]),
    )
    # Layers stay stacked, and the pads of the mesh are there.
    kernel = chat.params["vision_model"]["layers"]["attn"]["qkv"]["kernel"]
    tensor = mesh.shape["tensor"]
    assert kernel.shape[-2] == (5 if mode == "data" else -(-5 // tensor) * tensor)

    names = ["en_single", "zh_single", "two_separate", "text_only_turn2"]
    replies = chat.batch_chat(*zip(*map(asked, names)), **REFERENCE)
    assert [reply.tokens for reply in replies] == [PROMPTS[name]["generated_ids"] for name in names]


def shares(params):
    """The shape of one device's part of every leaf."""
    return [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(params)]


def test_logits():
    chat = internvl_jax.load(CHECKPOINT, mesh="data=2,tensor=4")
    ids, mask = ARRAYS["batch/batch_two/input_ids"], ARRAYS["batch/batch_two/attention_mask"]
    pixels = np.stack([ARRAYS[f"images/{name}/quickstart"] for name in FACTS["batches"][0]["images"]])
    logits = chat.logits(ids, pixels, mask)
    assert_close(logits[mask > 0], ARRAYS["logits/batch_two/fp32"][mask > 0], 2e-4, "logits")


@pytest.mark.parametrize(
    ("name", "spec", "vision"), [("llava", "data=2,tensor=4", None), ("v1_0", "fsdp=2,tensor=4", "gather")]
)
def test_llava_and_v1_0(name, spec, vision, tmp_path):
    """The original's greedy tokens, from the published directories."""
    root = LLAVA if name == "llava" else V1_0
    directory = root / "original"
    if name == "v1_0":
        directory = shutil.copytree(root / "checkpoint", tmp_path / "v1_0")
        shutil.copytree(root / "InternViT-6B-224px", tmp_path / "InternViT-6B-224px")
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "force_image_size": 84}))
    facts = bundle(root.name)[1]
    prompts = [p for p in facts["orig_prompts" if name == "llava" else "prompts"] if p.get("resolution", "r1") == "r1"]
    chat = internvl_jax.load(directory, mesh=spec, vision_mode=vision)
    questions, images, histories = [], [], []
    for prompt in prompts:
        *turns, question = prompt["messages"]
        questions.append(question)
        images.append([root / facts["images"][image]["file"] for image in prompt["images"]])
        histories.append(list(zip(turns[::2], turns[1::2])))
    replies = chat.batch_chat(questions, images, histories, honor_exif=False, max_new_tokens=32)
    assert [reply.tokens for reply in replies] == [prompt["generated_ids"] for prompt in prompts]


def test_bare_tower():
    arrays, _ = bundle("intern_vit")
    chat = internvl_jax.load(DATA / "intern_vit" / "checkpoint_bin", mesh="data=2,tensor=4")
    assert chat.params["vision_model"]["layers"]["attn"]["qkv"]["kernel"].shape[-2] == 8
    assert_close(chat.encode(arrays["pixel_values"]), arrays["last_hidden_state"], 1e-3, "last hidden state")


def test_illegal_meshes_are_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(loading, "read_params", lambda *_: pytest.fail("parameters were read"))
    monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("parameters were read"))
    for spec, message in (
        ("tensor=8", r"tensor=8 does not divide .*heads \(4\).*legal sizes of tensor on 8 devices are 1, 2, 4"),
        ("tensor=16", "needs 16 devices, there are 8"),
        ("tenser=4", "has the axis tenser; there are data, fsdp, tensor"),
        ("four", 'write for example "data=2,tensor=8"'),
        (make_mesh("tensor=8"), "tensor=8 does not divide"),
        (jax.make_mesh((8,), ("tensor",)), "make it with make_mesh"),
    ):
        with pytest.raises(mesh_lib.MeshError, match=message):
            internvl_jax.load(CHECKPOINT, mesh=spec)
    with pytest.raises(ValueError, match="vision mode 'both' is not one of tensor, data"):
        internvl_jax.load(CHECKPOINT, mesh="tensor=4", vision_mode="both")


def test_command_line(capsys):
    question, images, _ = asked("en_single")
    arguments = ["chat", "--checkpoint", str(CHECKPOINT), "--image", str(images[0]), "--max-new-tokens", "32"]
    assert main.main([*arguments, "--mesh", "data=2,tensor=4", question]) == 0
    assert capsys.readouterr() == (PROMPTS["en_single"]["response"] + "\n", CUT_OFF)
    assert main.main([*arguments, "--mesh", "tensor=3", question]) == 2
    assert "legal sizes of tensor" in capsys.readouterr().err
