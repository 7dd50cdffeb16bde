"""Write a checkpoint with a preset's true shapes in the published layout, as sparse files: for measuring memory.

    python -m checkpoints_convert.synthetic DIRECTORY [--preset NAME] [--random-layers N]

InternVL-Chat-V1-1 has 38 GB in four pytorch_model-*.bin, as published. The directories of LLaVA-1.5 and
InternVL-Chat-V1-0 contain their vision tower's directory, for LLaVA-1.5 with the tower's weights. The tensors are
zeros, holes in the files, without the zip's checksums, which torch does not check. With --random-layers the first
layers of both towers, and everything outside the layers, are random.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.mapping import TOWER, Tensor, tensors
from checkpoints_convert.readers import PICKLES
from checkpoints_convert.writers import assign_files, lay_out, write_at, write_index
from internvl_jax.config import PRESETS, ChatConfig, config_to_hf, vision_tower_name, vision_tower_to_hf
from internvl_jax.utils import formats
from internvl_jax.utils.files import new_directory

SHARD = 10 * 10**9  # bytes, as published
BFLOAT16 = np.dtype("bfloat16")

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


def write_synthetic(destination: str | Path, *, preset: str = "internvl_chat_v1_1", random_layers: int = 0) -> int:
    """Write the checkpoint in bfloat16, without a tokenizer.

    Args:
        destination: the directory to write; it must not exist.
        preset: a key of config.PRESETS.
        random_layers: the number of first layers of both towers that get seeded random values, which keep activations
            near unit size. Everything outside the layers gets them too if this is not 0. All other values are zero, so
            that later layers pass their input on.

    Returns:
        The bytes of the tensors.
    """
    config = PRESETS[preset]()
    table = {tensor.key: tensor for tensor in tensors(config)}
    sizes = {key: math.prod(tensor.shape) * BFLOAT16.itemsize for key, tensor in table.items()}
    hf, tower = config_to_hf(config), vision_tower_to_hf(config)
    name = vision_tower_name(hf)
    # V1-0's files hold the tower, LLaVA-1.5's leave it in CLIP's.
    parts = dict.fromkeys(table, "")
    if name is not None and config.required_vision.embedding_norm:
        parts = {key: f"{name}/" if key.startswith(TOWER) else "" for key in table}
    weight_map = {}
    for part in dict.fromkeys(parts.values()):
        files = assign_files({key: size for key, size in sizes.items() if parts[key] == part}, SHARD, PICKLES[1])
        weight_map.update({key: part + file for key, file in files.items()})
    filled = [t for t in table.values() if random_layers and (not t.index or t.index[0] < random_layers)]
    with new_directory(destination, sum(sizes[tensor.key] for tensor in filled)) as directory:
        contents = {"config.json": hf}
        if name is not None and tower is not None:
            (directory / name).mkdir()
            contents[f"{name}/config.json"] = tower
        contents[f"{name}/preprocessor_config.json" if name else "preprocessor_config.json"] = _preprocessor(config)
        for file, content in contents.items():
            (directory / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        places = {}
        for file in dict.fromkeys(weight_map.values()):
            keys = [key for key in table if weight_map[key] == file]
            names = [key.removeprefix(TOWER) if "/" in file else key for key in keys]
            laid_out = lay_out(directory / file, {n: (table[k].shape, BFLOAT16) for n, k in zip(names, keys)})
            places.update({key: laid_out[name] for name, key in zip(names, keys)})
        for tensor in filled:
            write_at(directory / weight_map[tensor.key], places[tensor.key], _random(tensor))
        for part in dict.fromkeys(parts.values()):
            keys = [key for key in table if parts[key] == part]
            files = {key.removeprefix(TOWER if part else ""): Path(weight_map[key]).name for key in keys}
            write_index(directory / part, files, sum(sizes[key] for key in keys))
    return sum(sizes.values())


def _preprocessor(config: ChatConfig) -> dict[str, Any]:
    return {
        "crop_size": config.image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        **(CLIP if config.required_vision.embedding_norm else IMAGENET),
        "resample": 3,
        "size": config.image_size,
    }


def _random(tensor: Tensor) -> np.ndarray:
    values = np.random.default_rng(zlib.crc32(tensor.key.encode())).standard_normal(tensor.shape, np.float32)
    if tensor.path.endswith(("scale", "ls1", "ls2")):
        values = 1 + values / np.float32(10)
    elif tensor.transposed:
        values = values / np.float32(math.sqrt(math.prod(tensor.shape[1:])))
    return values.astype(BFLOAT16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="to write; must not exist")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="internvl_chat_v1_1")
    parser.add_argument("--random-layers", type=int, default=0, metavar="N", help="layers with random contents (0)")
    args = parser.parse_args()
    size = write_synthetic(args.directory, preset=args.preset, random_layers=args.random_layers)
    print(f"{args.directory}: {formats.disk(size)} of tensors")


if __name__ == "__main__":
    main()
