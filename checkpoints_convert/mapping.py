"""Mapping tables between published tensors and our parameter tree, one per layout.

A row maps a key to a leaf. Weights of linear layers are transposed from [out, in] to [in, out]; then every tensor is
reshaped to our axes (separate heads, for example). Both steps only move numbers, so the inverse is exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from internvl_jax.config import ChatConfig, TextConfig, VisionConfig


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message lists all problems."""


@dataclass(frozen=True)
class Tensor:
    """A published tensor and its place in the tree.

    Attributes:
        key: its name in the file.
        shape: its shape in the file.
        path: the leaf of our tree, "a/b/c".
        index: the part of the leaf: (layer,) of a stack, (layer, slice, part) of a fused leaf in a stack, else ().
        transposed: whether its first axis comes last in our tree.
        our_shape: the shape of that part of the leaf.
    """

    key: str
    shape: tuple[int, ...]
    path: str
    index: tuple[Any, ...]
    transposed: bool
    our_shape: tuple[int, ...]

    def to_ours(self, values: np.ndarray) -> np.ndarray:
        """Convert values from the file's shape to ours."""
        if self.transposed:
            values = _transpose(values.reshape(values.shape[0], -1))
        return values.reshape(self.our_shape)

    def to_theirs(self, values: np.ndarray) -> np.ndarray:
        """Convert values from our shape to the file's."""
        if self.transposed:
            values = _transpose(values.reshape(-1, self.shape[0]))
        return values.reshape(self.shape)


def _transpose(values: np.ndarray) -> np.ndarray:
    """Copy [a,b] to [b,a] in strips that fit into the processor's cache, which is five times as fast."""
    result = np.empty(values.shape[::-1], values.dtype)
    # As integers: numpy copies bfloat16, an extension type, one number at a time.
    source, target = (array.view(f"i{values.itemsize}") for array in (np.ascontiguousarray(values), result))
    for row in range(0, len(source), 32):
        target[:, row : row + 32] = source[row : row + 32].T
    return result


@dataclass(frozen=True)
class _Row:
    """One row of a table. `{}` in the key stands for the layer's number."""

    key: str
    shape: tuple[int, ...]
    path: str
    our_shape: tuple[int, ...]
    transposed: bool = False
    part: int | None = None  # of a fused kernel [D,3,N,H] or bias [3,N,H]: 0 q, 1 k, 2 v


# InternLM2 packs q, k and v into one tensor [kv_heads, groups + 2, head_dim, D]: for each kv head its queries, key and
# value. The tables name the parts "KEY#q_proj", and `unpack` and `pack` are the way there and back.
PART = "#"
PACKED = ("q_proj", "k_proj", "v_proj")


def physical(key: str) -> str:
    """The name in the file of a tensor, or of a part of a packed one."""
    return key.partition(PART)[0]


def packed_keys(config: ChatConfig) -> list[str]:
    """The names in the files of all packed tensors."""
    return list(dict.fromkeys(physical(tensor.key) for tensor in tensors(config) if PART in tensor.key))


def unpack(text: TextConfig, values: np.ndarray) -> dict[str, np.ndarray]:
    """The parts of a packed tensor by name, each [heads * head_dim, D]."""
    kv_heads, dim = text.num_key_value_heads, text.head_dim
    groups = text.num_attention_heads // kv_heads
    rows = values.reshape(kv_heads, groups + 2, dim, -1)
    parts = rows[:, :groups], rows[:, groups], rows[:, groups + 1]
    return {name: part.reshape(-1, rows.shape[-1]) for name, part in zip(PACKED, parts)}


def pack(text: TextConfig, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The inverse of `unpack`."""
    kv_heads, dim = text.num_key_value_heads, text.head_dim
    rows = [parts[name].reshape(kv_heads, -1, dim, parts[name].shape[-1]) for name in PACKED]
    return np.concatenate(rows, axis=1).reshape(-1, rows[0].shape[-1])


EMBEDDING = "language_model/embed_tokens/embedding"
_HEAD = re.compile(r"(language_model\.)?(lm_head|output)\.weight")


def tensors(config: ChatConfig) -> list[Tensor]:
    """All tensors of a checkpoint with this configuration, in the layout's own order, layer after layer."""
    return [tensor for rows, layers in _tables(config) for tensor in _expand(rows, layers)]


def plan(config: ChatConfig, found: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Match the tensors in a checkpoint's files with the parameter tree.

    Args:
        config: the checkpoint's configuration.
        found: the shapes of the tensors, by key in the files.

    Returns:
        The matched tensors by key in the files, without buffers.

    Raises:
        ConversionError: tensors are missing, unexpected or have the wrong shape; all are listed.
    """
    expected = {tensor.key: tensor for tensor in tensors(config)}
    names = {name: canonical(config, name) for name in found}
    problems, matched = [], {}
    for name, key in names.items():
        if key is None:
            continue
        tensor = expected.pop(key, None)
        if tensor is None:
            problems.append(f"unexpected: {name} {list(found[name])}")
        elif tuple(found[name]) != tensor.shape:
            problems.append(f"misshapen: {name} is {list(found[name])}, config.json asks for {list(tensor.shape)}")
        else:
            matched[name] = tensor
    tied = config.text is not None and config.text.tie_word_embeddings
    if tied:  # some files hold the head beside the embedding, or instead of it
        heads = [name for name, key in names.items() if key is not None and _HEAD.fullmatch(key)]
        absent = next((key for key, tensor in expected.items() if tensor.path == EMBEDDING), None)
        for head in heads[:1]:
            if absent is not None and tuple(found[head]) == expected[absent].shape:
                matched[head] = expected.pop(absent)
        problems = [p for p in problems if not any(p.startswith(f"unexpected: {head} ") for head in heads)]
    problems += [f"missing: {tensor.key} {list(tensor.shape)}" for tensor in expected.values()]
    if problems:
        raise ConversionError(
            "the tensors do not fit config.json (is it the file of this checkpoint?):\n  "
            + "\n  ".join(_at_most(100, sorted(problems)))
        )
    return matched


def _at_most(count: int, lines: list[str]) -> list[str]:
    return lines[:count] + ([f"and {len(lines) - count} more"] if len(lines) > count else [])


# Names of the same tensors in other versions of transformers.
_RENAMED = {
    "internvl": (
        (r"^model\.vision_tower\.", "vision_tower."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
    ),
    "llama": ((r"^(?=(embed_tokens|layers|norm)\.)", "model."),),  # of a LlamaModel alone
    "llava_hf": (
        (r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
    ),
}
# Buffers, which transformers recomputes: whether files and index have them depends on its version.
_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(original_)?inv_freq|(rotary_emb\.)?_?(cos|sin)_cached|embeddings\.position_ids|masked_bias"
    r"|causal_mask|num_batches_tracked)$"
    # CLIP's post_layernorm is a parameter of models that read the pooled output; no chat model does.
    r"|vision_tower.*\.post_layernorm\.(weight|bias)$"
)
# Tensors that only quantized weights have, and the method that writes them.
_QUANTIZED = (
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (
        re.compile(r"\.weight\.(absmax|quant_map|nested_absmax|quant_state\.\w+)$|\.(SCB|weight_format)$"),
        "bitsandbytes",
    ),
    (re.compile(r"\.weight_(packed|shape|zero_point)$"), "compressed-tensors"),
    (re.compile(r"\.(weight_scale(_inv)?|input_scale)$"), "fp8"),
)


def is_buffer(name: str) -> bool:
    """Whether a tensor called `name` is a buffer and not a parameter; files may have it or not."""
    return _BUFFERS.search(name) is not None


def quantized_by(names: Iterable[str]) -> str | None:
    """The quantization method that wrote tensors of these names, with one of the names; None if not quantized."""
    for name in names:
        for pattern, method in _QUANTIZED:
            if pattern.search(name):
                return f"{method} ({name})"
    return None


# LLaVA's prefix for the tensors of its vision tower, whether they are in its files or published apart.
TOWER = "model.vision_tower.vision_tower."
# transformers 5 saves a CLIPVisionModel without "vision_model.".
_CLIP_RENAMED = ((rf"^{re.escape(TOWER)}(vision_model\.)?", f"{TOWER}vision_model."),)


def canonical(config: ChatConfig, name: str) -> str | None:
    """The tables' name of a tensor called `name` in a file; None for a buffer."""
    if is_buffer(name):
        return None
    has_clip = config.layout == "llava" and config.required_vision.embedding_norm
    for pattern, replacement in _CLIP_RENAMED if has_clip else _RENAMED.get(config.layout, ()):
        renamed = re.sub(pattern, replacement, name)
        if renamed != name:
            return renamed
    return name


def _tables(config: ChatConfig) -> Iterator[tuple[list[_Row], int]]:
    layout, vision, text = config.layout, config.vision, config.text
    if layout == "internvl":
        yield from _hf_vision(config.required_vision, "vision_tower.")
        yield _projector(config, "multi_modal_projector.", ("layer_norm", "linear_1", "linear_2")), 0
        yield from _llama(config.required_text, "language_model.")
        return
    if layout == "llava_hf":
        yield from _clip_vision(config.required_vision, "vision_tower.vision_model.")
        yield _projector(config, "multi_modal_projector.", ("", "linear_1", "linear_2")), 0
        yield from _llama(config.required_text, "language_model.")
        return
    if layout == "llava":
        # In the order of the files: the language model, the projector, the tower.
        yield from _llama(config.required_text, "")
        yield _projector(config, "model.mm_projector.", ("", "0", "2")), 0
        tower = config.required_vision
        yield from _clip_vision(tower, f"{TOWER}vision_model.") if tower.embedding_norm else _intern_vit(tower, TOWER)
        return
    if vision is not None:
        yield from _intern_vit(vision, "vision_model." if layout == "internvl_chat" else "")
    if config.projector is not None:
        yield _projector(config, "mlp1.", ("0", "1", "3")), 0
    if text is not None:
        yield from _llama(text, "language_model." if layout == "internvl_chat" else "")


def _expand(rows: list[_Row], layers: int) -> Iterator[Tensor]:
    """Expand rows to tensors: once if `layers` is 0, else once per layer."""
    for layer in range(layers) if layers else (None,):
        for row in rows:
            index: tuple[Any, ...] = () if layer is None else (layer,)
            if row.part is not None:
                # The fused axis comes before heads: [D,3,N,H] for kernels, [3,N,H] for biases.
                index += (slice(None),) * (len(row.our_shape) - 2) + (row.part,)
            yield Tensor(
                row.key if layer is None else row.key.format(layer),
                row.shape, row.path, index, row.transposed, row.our_shape,
            )  # fmt: skip


def _vector(key: str, path: str, width: int) -> _Row:
    return _Row(key, (width,), path, (width,))


def _linear(key: str, path: str, inputs: int, outputs: int, *, bias: bool, kernel: Any = None) -> list[_Row]:
    """A torch Linear: weight [out,in] and perhaps bias. kernel: our axes, if they are not [in,out]."""
    rows = [_Row(f"{key}.weight", (outputs, inputs), f"{path}/kernel", kernel or (inputs, outputs), transposed=True)]
    return rows + [_vector(f"{key}.bias", f"{path}/bias", outputs)] if bias else rows


def _norm(key: str, path: str, width: int, *, bias: bool) -> list[_Row]:
    rows = [_vector(f"{key}.weight", f"{path}/scale", width)]
    return rows + [_vector(f"{key}.bias", f"{path}/bias", width)] if bias else rows


def _embeddings(vision: VisionConfig, names: tuple[str, str, str]) -> list[_Row]:
    """Class token, positions and patches; names: of the class token, of the positions, of the patch convolution."""
    width, size = vision.hidden_size, vision.patch_size
    positions = 1 + vision.grid**2
    pixels = vision.num_channels * size * size
    path = "vision_model/embeddings"
    return [
        _Row(names[0], (1, 1, width), f"{path}/class_embedding", (width,)),
        _Row(names[1], (1, positions, width), f"{path}/position_embedding", (positions, width)),
        _Row(
            f"{names[2]}.weight", (width, vision.num_channels, size, size),
            f"{path}/patch_embedding/kernel", (pixels, width), transposed=True,
        ),
        _vector(f"{names[2]}.bias", f"{path}/patch_embedding/bias", width),
    ]  # fmt: skip


def _intern_vit(vision: VisionConfig, prefix: str) -> Iterator[tuple[list[_Row], int]]:
    """OpenGVLab's InternViT."""
    width, heads, dim, hidden = (
        vision.hidden_size,
        vision.num_attention_heads,
        vision.head_dim,
        vision.intermediate_size,
    )
    names = (f"{prefix}embeddings.class_embedding", f"{prefix}embeddings.position_embedding")
    yield _embeddings(vision, (*names, f"{prefix}embeddings.patch_embedding")), 0
    key, path = f"{prefix}encoder.layers.{{}}", "vision_model/layers"
    has_bias = vision.norm_type == "layer_norm"
    rows = [_Row(f"{key}.attn.qkv.weight", (3 * width, width), f"{path}/attn/qkv/kernel", (width, 3, heads, dim), True)]
    if vision.qkv_bias:
        rows.append(_Row(f"{key}.attn.qkv.bias", (3 * width,), f"{path}/attn/qkv/bias", (3, heads, dim)))
    if vision.qk_normalization:
        rows += [
            _Row(f"{key}.attn.{name}.weight", (width,), f"{path}/attn/{name}/scale", (heads, dim))
            for name in ("q_norm", "k_norm")
        ]
    rows += _linear(f"{key}.attn.proj", f"{path}/attn/proj", width, width, bias=True, kernel=(heads, dim, width))
    rows += [_vector(f"{key}.{name}", f"{path}/{name}", width) for name in ("ls1", "ls2")]
    rows += _norm(f"{key}.norm1", f"{path}/norm1", width, bias=has_bias)
    rows += _norm(f"{key}.norm2", f"{path}/norm2", width, bias=has_bias)
    rows += _linear(f"{key}.mlp.fc1", f"{path}/mlp/fc1", width, hidden, bias=True)
    rows += _linear(f"{key}.mlp.fc2", f"{path}/mlp/fc2", hidden, width, bias=True)
    yield rows, vision.num_hidden_layers


def _hf_vision(vision: VisionConfig, prefix: str) -> Iterator[tuple[list[_Row], int]]:
    """transformers' InternVLVisionModel: the same tower with separate q, k and v, and other names."""
    width, heads, dim, hidden = (
        vision.hidden_size,
        vision.num_attention_heads,
        vision.head_dim,
        vision.intermediate_size,
    )
    names = (f"{prefix}embeddings.cls_token", f"{prefix}embeddings.position_embeddings")
    yield _embeddings(vision, (*names, f"{prefix}embeddings.patch_embeddings.projection")), 0
    key, path = f"{prefix}encoder.layer.{{}}", "vision_model/layers"
    attention = f"{key}.attention"
    has_bias = vision.norm_type == "layer_norm"
    rows: list[_Row] = []
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        shape = (width, width)
        rows.append(
            _Row(f"{attention}.{name}.weight", shape, f"{path}/attn/qkv/kernel", (width, heads, dim), True, part)
        )
        if vision.qkv_bias:
            rows.append(_Row(f"{attention}.{name}.bias", (width,), f"{path}/attn/qkv/bias", (heads, dim), part=part))
    if vision.qk_normalization:
        rows += [
            _Row(f"{attention}.{name}.weight", (width,), f"{path}/attn/{name}/scale", (heads, dim))
            for name in ("q_norm", "k_norm")
        ]
    rows += _linear(
        f"{attention}.projection_layer", f"{path}/attn/proj", width, width, bias=True, kernel=(heads, dim, width)
    )
    rows += [_vector(f"{key}.lambda_{n}", f"{path}/ls{n}", width) for n in (1, 2)]
    rows += _norm(f"{key}.layernorm_before", f"{path}/norm1", width, bias=has_bias)
    rows += _norm(f"{key}.layernorm_after", f"{path}/norm2", width, bias=has_bias)
    rows += _linear(f"{key}.mlp.fc1", f"{path}/mlp/fc1", width, hidden, bias=True)
    rows += _linear(f"{key}.mlp.fc2", f"{path}/mlp/fc2", hidden, width, bias=True)
    yield rows, vision.num_hidden_layers


def _clip_vision(vision: VisionConfig, prefix: str) -> Iterator[tuple[list[_Row], int]]:
    """transformers' CLIPVisionModel."""
    width, heads, dim, hidden = (
        vision.hidden_size,
        vision.num_attention_heads,
        vision.head_dim,
        vision.intermediate_size,
    )
    size, positions = vision.patch_size, 1 + vision.grid**2
    key, path = f"{prefix}embeddings", "vision_model/embeddings"
    rows = [
        _vector(f"{key}.class_embedding", f"{path}/class_embedding", width),
        _Row(
            f"{key}.patch_embedding.weight", (width, vision.num_channels, size, size),
            f"{path}/patch_embedding/kernel", (vision.num_channels * size * size, width), transposed=True,
        ),
        _Row(f"{key}.position_embedding.weight", (positions, width), f"{path}/position_embedding", (positions, width)),
    ]  # fmt: skip
    yield rows + _norm(f"{prefix}pre_layrnorm", f"{path}/pre_layrnorm", width, bias=True), 0
    key, path = f"{prefix}encoder.layers.{{}}", "vision_model/layers"
    rows = []
    for name in ("k_proj", "v_proj", "q_proj"):
        part = ("q_proj", "k_proj", "v_proj").index(name)
        where = f"{key}.self_attn.{name}"
        rows += [
            _Row(f"{where}.weight", (width, width), f"{path}/attn/qkv/kernel", (width, heads, dim), True, part),
            _Row(f"{where}.bias", (width,), f"{path}/attn/qkv/bias", (heads, dim), part=part),
        ]
    rows += _linear(
        f"{key}.self_attn.out_proj", f"{path}/attn/proj", width, width, bias=True, kernel=(heads, dim, width)
    )
    rows += _norm(f"{key}.layer_norm1", f"{path}/norm1", width, bias=True)
    rows += _linear(f"{key}.mlp.fc1", f"{path}/mlp/fc1", width, hidden, bias=True)
    rows += _linear(f"{key}.mlp.fc2", f"{path}/mlp/fc2", hidden, width, bias=True)
    rows += _norm(f"{key}.layer_norm2", f"{path}/norm2", width, bias=True)
    yield rows, vision.num_hidden_layers


def _projector(config: ChatConfig, prefix: str, names: tuple[str, str, str]) -> list[_Row]:
    """LayerNorm (in some layouts), Linear and Linear, under the layout's names."""
    projector = config.required_projector
    inputs, outputs = projector.in_features, projector.out_features
    rows = _norm(prefix + names[0], "mlp1/norm", inputs, bias=True) if projector.layer_norm else []
    rows += _linear(prefix + names[1], "mlp1/fc1", inputs, outputs, bias=True)
    return rows + _linear(prefix + names[2], "mlp1/fc2", outputs, outputs, bias=True)


# InternLM2's names of the language model's tensors, where they differ from LLaMA's.
_INTERNLM2 = {
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    **{f"self_attn.{name}": "attention.wqkv" for name in PACKED},
}


def _llama(text: TextConfig, prefix: str) -> Iterator[tuple[list[_Row], int]]:
    """LlamaForCausalLM, and its relatives with other names or further tensors."""
    width, dim = text.hidden_size, text.head_dim
    path = "language_model"
    names = _INTERNLM2 if text.family == "internlm2" else {}

    def key(name: str, layer: str = "") -> str:
        return f"{prefix}{layer}{names.get(name, name)}"

    outer = [
        _Row(f"{key('model.embed_tokens')}.weight", (text.vocab_size, width), f"{path}/embed_tokens/embedding",
             (text.vocab_size, width))
    ]  # fmt: skip
    outer += _norm(f"{prefix}model.norm", f"{path}/norm", width, bias=False)
    if not text.tie_word_embeddings:
        outer += _linear(key("lm_head"), f"{path}/lm_head", width, text.vocab_size, bias=False)
    yield outer, 0
    layer, path = "model.layers.{}.", f"{path}/layers"
    rows = _norm(key("input_layernorm", layer), f"{path}/input_layernorm", width, bias=False)
    for name, heads in (
        ("q_proj", text.num_attention_heads),
        ("k_proj", text.num_key_value_heads),
        ("v_proj", text.num_key_value_heads),
    ):
        ours, theirs = f"{path}/self_attn/{name}", key(f"self_attn.{name}", layer)
        kernel = _linear(theirs, ours, width, heads * dim, bias=False, kernel=(width, heads, dim))
        if text.family == "internlm2":
            kernel = [replace(row, key=f"{row.key}{PART}{name}") for row in kernel]
        rows += kernel
        if text.qkv_bias:
            rows.append(_Row(f"{theirs}.bias", (heads * dim,), f"{ours}/bias", (heads, dim)))
    if text.qk_norm:
        for name in ("q_norm", "k_norm"):
            rows += _norm(key(f"self_attn.{name}", layer), f"{path}/self_attn/{name}", dim, bias=False)
    inner = text.num_attention_heads * dim
    rows += _linear(
        key("self_attn.o_proj", layer), f"{path}/self_attn/o_proj", inner, width,
        bias=text.attention_bias, kernel=(text.num_attention_heads, dim, width),
    )  # fmt: skip
    rows += _norm(key("post_attention_layernorm", layer), f"{path}/post_attention_layernorm", width, bias=False)
    for name in ("gate_proj", "up_proj"):
        ours, theirs = f"{path}/mlp/{name}", key(f"mlp.{name}", layer)
        rows += _linear(theirs, ours, width, text.intermediate_size, bias=text.mlp_bias)
    down = key("mlp.down_proj", layer)
    rows += _linear(down, f"{path}/mlp/down_proj", text.intermediate_size, width, bias=text.mlp_bias)
    yield rows, text.num_hidden_layers
