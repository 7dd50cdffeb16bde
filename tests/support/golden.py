"""What the parity tests share: golden data, published tensors to our tree and back, comparisons that say where.

All of it is numpy: outside jit, jax would compile every small operation.
"""

import json

import jax
import ml_dtypes
import numpy as np
from support.paths import DATA

from checkpoints_convert import mapping


def bundle(name):
    """The golden arrays and facts of tests/data/`name`."""
    directory = DATA / name
    return np.load(directory / "goldens.npz"), json.loads((directory / "goldens.json").read_text(encoding="utf-8"))


def read_safetensors(directory):
    """The tensors of a directory's safetensors files, key -> float32 array, read without torch."""
    state = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for key, entry in json.loads(data[8:start]).items():
            if key != "__metadata__":
                dtype = {"BF16": ml_dtypes.bfloat16, "F32": np.float32}[entry["dtype"]]
                first, last = (start + offset for offset in entry["data_offsets"])
                state[key] = np.frombuffer(data[first:last], dtype).reshape(entry["shape"]).astype(np.float32)
    return state


def tree_of(config, state):
    """Our float32 parameters from published tensors, key -> array; none may be missing or unexpected."""
    leaves = {}
    for name, tensor in mapping.plan(config, {name: values.shape for name, values in state.items()}).items():
        leaves.setdefault(tensor.path, []).append((tensor.index, tensor.to_ours(np.array(state[name], np.float32))))
    tree = {}
    for path, parts in leaves.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = _joined(parts)
    return tree


def _joined(parts):
    """One leaf of its parts: (index, values) with index () for a whole leaf, (layer, ...) for a stack."""
    if parts[0][0] == ():
        return parts[0][1]
    layers = {}
    for (layer, *rest), values in parts:
        layers.setdefault(layer, []).append((rest, values))
    return np.stack([_unfused(layers[layer]) for layer in sorted(layers)])


def _unfused(parts):
    if not parts[0][0]:
        return parts[0][1]
    parts = sorted(parts, key=lambda part: part[0][-1])  # q, k and v, whose axis stands before heads
    return np.stack([values for _, values in parts], axis=len(parts[0][0]) - 1)


def leaf(tree, path):
    """The leaf at "a/b/c"."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def published(config, tree):
    """Published tensors, key -> array in the file's shape, of a tree like our parameters (gradients, say)."""
    return {
        tensor.key: tensor.to_theirs(np.asarray(leaf(tree, tensor.path)[tensor.index]))
        for tensor in mapping.tensors(config)
    }


def torch_tree(config, model):
    """Our parameters from a torch module that was built in the test."""
    state = {name: values.detach().float().numpy() for name, values in model.state_dict().items()}
    return tree_of(config, state)


def random_tree(abstract, seed=0):
    """Random float32 parameters of the given shapes, spread out as `spread` does it."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").rsplit("/", 1)[-1]
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if name in ("scale", "ls1", "ls2"):
            return 1 + 0.3 * noise
        return noise * (0.2 if name == "kernel" else 0.7)

    return jax.tree.map_with_path(draw, abstract)


def spread(model, seed):
    """Give every parameter of a torch module random values of a size that matters; returns the module for inference.

    Matrices keep the activations' size, norm and layer scales stand around 1, biases and the rest around 0.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, values in model.named_parameters():
            noise = torch.randn(values.shape, generator=generator)
            if values.ndim >= 2 and "embed" not in name.rsplit(".", 2)[-2]:
                values.copy_(noise * 1.3 / np.sqrt(values[0].numel()))
            elif values.ndim == 1 and not name.endswith("bias"):
                values.copy_(1 + 0.3 * noise)
            else:
                values.copy_(noise * 0.7)
    return model.eval()


def assert_close(ours, theirs, tolerance, what=""):
    """Fail with the largest absolute error and its place where it is more than `tolerance`."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    assert ours.shape == theirs.shape, f"{what}: shape {ours.shape}, the reference has {theirs.shape}"
    error = np.abs(ours - theirs)
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
    assert error[worst] <= tolerance, (
        f"{what}: largest error {error[worst]:.3g} (mean {error.mean():.3g}, tolerance {tolerance:.3g}) "
        f"at {tuple(map(int, worst))}: {ours[worst]:.6g}, the reference has {theirs[worst]:.6g}"
    )


def kl(reference, ours):
    """Kullback-Leibler divergence at every position: logits [...,V] -> [...]."""
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (reference, ours))
    return np.sum(np.exp(p) * (p - q), axis=-1)
