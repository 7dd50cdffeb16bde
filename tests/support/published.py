"""Published checkpoints of the golden data, read by torch and safetensors alone."""

import shutil

import pytest
from support.llava_cases import LLAVA
from support.paths import DATA

from checkpoints_convert.mapping import TOWER

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

V1_1 = DATA / "internvl_chat_v1_1" / "checkpoint"
VIT_BIN = DATA / "intern_vit" / "checkpoint_bin"
VIT_SAFE = DATA / "intern_vit" / "checkpoint_safetensors"


def state_of(directory):
    """key -> tensor of a published directory, by torch and safetensors alone."""
    state = {}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".bin":
            state.update(torch.load(path, weights_only=True))
        elif path.suffix == ".safetensors":
            state.update(safetensors_torch.load_file(path))
    return state


def assert_same_bits(ours, theirs):
    assert set(ours) == set(theirs)
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype, key
        assert ours[key].shape == theirs[key].shape, key
        a, b = (x.contiguous().reshape(-1).view(torch.uint8) for x in (ours[key], theirs[key]))
        assert torch.equal(a, b), key


def single_file(tmp_path, change):
    """V1-1's vision tower in one pytorch_model.bin, changed."""
    directory = tmp_path / "hf"
    directory.mkdir()
    shutil.copy(VIT_BIN / "config.json", directory)
    state = state_of(VIT_BIN)
    change(state)
    torch.save(state, directory / "pytorch_model.bin")
    return directory


CLIP = "clip-vit-large-patch14-336"


def with_tower(directory):
    """LLaVA re-saved with its tower: one pickle of everything, and buffers of an older transformers."""
    directory.mkdir()
    for path in (LLAVA / "original").iterdir():
        if path.suffix in (".json", ".model") and "index" not in path.name:
            shutil.copy(path, directory)
    state = state_of(LLAVA / "original")
    tower = {key: values for key, values in state_of(LLAVA / CLIP).items() if key.startswith("vision_model.")}
    state.update({TOWER + key: values for key, values in tower.items()})
    state[f"{TOWER}vision_model.embeddings.position_ids"] = torch.arange(37)[None]
    torch.save(state, directory / "pytorch_model.bin")
    return directory
