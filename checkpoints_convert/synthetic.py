"""A checkpoint of a preset's true shapes in the published layout, almost without disk space: for measuring memory.

    python -m checkpoints_convert.synthetic DIRECTORY [--random-layers N]

InternVL-Chat-V1-1 comes out as 38 GB in four pytorch_model-*.bin, as published. The tensors are zeros that the files
leave as holes, without the checksums of the zip, at which torch never looks; with --random-layers the first layers
of both towers, and everything outside the layers, are random.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from pathlib import Path

import numpy as np

from checkpoints_convert.files import new_directory
from checkpoints_convert.mapping import Tensor, tensors
from checkpoints_convert.readers import PICKLES
from checkpoints_convert.writers import assign_files, lay_out, write_at, write_index
from internvl_jax.config import PRESETS

SHARD = 10 * 10**9  # bytes, as the published ones are
BFLOAT16 = np.dtype("bfloat16")

PREPROCESSOR = {
    "crop_size": 448,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 448,
}


def write_synthetic(destination: str | Path, *, preset: str = "internvl_chat_v1_1", random_layers: int = 0) -> int:
    """Write the checkpoint, bfloat16, without tokenizer; returns the bytes of its tensors.

    random_layers: so many first layers of both towers, and what is outside them, get seeded random values that keep
    activations near unit size; everything else is zero, so that later layers pass their input on.
    """
    config = PRESETS[preset]()
    table = {tensor.key: tensor for tensor in tensors(config)}
    sizes = {key: math.prod(tensor.shape) * BFLOAT16.itemsize for key, tensor in table.items()}
    weight_map = assign_files(sizes, SHARD, PICKLES[1])
    filled = [t for t in table.values() if random_layers and (not t.index or t.index[0] < random_layers)]
    with new_directory(destination, sum(sizes[tensor.key] for tensor in filled)) as directory:
        places = {}
        for file in dict.fromkeys(weight_map.values()):
            specs = {key: (tensor.shape, BFLOAT16) for key, tensor in table.items() if weight_map[key] == file}
            places.update(lay_out(directory / file, specs))
        for tensor in filled:
            write_at(directory / weight_map[tensor.key], places[tensor.key], _random(tensor))
        write_index(directory, weight_map, sum(sizes.values()))
        for name, content in (("config.json", config.to_hf()), ("preprocessor_config.json", PREPROCESSOR)):
            (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return sum(sizes.values())


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
    print(f"{args.directory}: {size / 1e9:.1f} GB of tensors")


if __name__ == "__main__":
    main()
