"""LLaMA (Touvron et al., 2023) with a key/value cache that is an ordinary value, as pure functions on parameters."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jax.sharding import PartitionSpec as P

from internvl_jax.config import TextConfig
from internvl_jax.models.attention import Mask, attention, cache_mask, self_mask
from internvl_jax.models.declare import declared
from internvl_jax.models.layers import (
    MASK_VALUE,
    Array,
    Linear,
    Params,
    Remat,
    RMSNorm,
    apply_rope,
    init_stack,
    made_again,
    pin_layout,
    product,
    rope_angles,
    run_layers,
)
from internvl_jax.parallel.partitioning import constrain, logical_spec

CACHE_AXES = ("layers", "batch", "kv_heads", None, None)  # [L,B,K,S,H]


class KeysValues(NamedTuple):
    """Keys and values where they lie: one layer's [B,K,S,H], or all layers' [L,B,K,S,H] and which of them is meant."""

    k: Array
    v: Array
    scales: tuple[Array, Array] | None = None  # as KVCache's
    layer: int | Array | None = None


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of what was read so far. A value: passed in, returned, donated by the caller.

    Slots are shared by the rows: token i of a call goes to slot length + i of every row, whatever its position.
    """

    k: Any  # Array [L,B,K,S,H], or a tuple of L [B,K,S,H] where the parameters are a tuple
    v: Any
    positions: Array  # [B,S] int32, the position of the token in each slot
    valid: Array  # [B,S] bool, False for padding and for slots not yet written
    length: Array  # [] int32, slots written
    # Of an int8 cache: k's and v's scales, one per token and head, float32 [L,B,K,S] each (or tuples of [B,K,S]).
    scales: Any = None

    @property
    def slots(self) -> int:
        return self.positions.shape[1]

    def fold(self) -> KVCache:
        """Rows and heads of a tuple's layers as one axis, [B*K,S,H], for a loop to carry; a stack stays as it is.

        It is the axis over which XLA's CPU backend batches products. A reshape between what a loop carries and what the
        products read would have it write both, and copy each layer's keys and values four times per token.
        """
        return self._group(-1)

    def unfold(self) -> KVCache:
        """Undo `fold`."""
        return self._group(self.positions.shape[0], -1)

    def _group(self, *axes: int) -> KVCache:
        if not isinstance(self.k, tuple):
            return self
        k, v = jax.tree.map(lambda leaf: leaf.reshape(*axes, *leaf.shape[-2:]), (self.k, self.v))
        return self.replace(
            k=k, v=v, scales=jax.tree.map(lambda leaf: leaf.reshape(*axes, leaf.shape[-1]), self.scales)
        )

    def note(self, positions: Array, valid: Array) -> KVCache:
        """Record the positions and validity of T new tokens [B,T], before the layers append their k and v."""
        start = (0, self.length)
        return self.replace(
            positions=jax.lax.dynamic_update_slice(self.positions, positions.astype(jnp.int32), start),
            valid=jax.lax.dynamic_update_slice(self.valid, valid, start),
        )

    def append(self, layer: int | Array, k: Array, v: Array) -> KVCache:
        """Write one layer's k and v [B,K,T,H] at the next slots."""
        if self.scales is None:
            return self.replace(k=self._write(self.k, layer, k), v=self._write(self.v, layer, v))
        quantized = [qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=(0, 1, 2)) for x in (k, v)]
        k, v = (self._write(stack, layer, x.qvalue) for stack, x in zip((self.k, self.v), quantized))
        scales = tuple(self._write(stack, layer, x.scale[..., 0]) for stack, x in zip(self.scales, quantized))
        return self.replace(k=k, v=v, scales=scales)

    def _write(self, stack: Any, layer: int | Array, new: Array) -> Any:
        """One layer's new [B,K,T,H] or [B,K,T] into a stack (or tuple) of them."""
        if isinstance(stack, tuple):
            old = stack[layer]
            axis = old.ndim - new.ndim + 2  # of the slots: one less where rows and heads are folded
            new = new.reshape(*old.shape[:axis], *new.shape[2:]).astype(old.dtype)
            written = jax.lax.dynamic_update_slice_in_dim(old, new, self.length, axis)
            return (*stack[:layer], written, *stack[layer + 1 :])
        # The whole stack is carried through the scan and updated in place: as a scanned input and output it would be
        # held twice. For one token at a time the TPU's compiler would have the loop keep slots outermost, and copy it.
        stack = pin_layout(stack, logical_spec(*CACHE_AXES[: stack.ndim]), tuple(range(stack.ndim)))
        slot = (0, 0, self.length, 0)[: new.ndim]
        return jax.lax.dynamic_update_slice(stack, new.astype(stack.dtype)[None], (layer, *slot))

    def read(self, layer: int | Array) -> KeysValues:
        """What holds a layer's k and v, for `attention`."""
        if isinstance(self.k, tuple):
            cache = self.unfold()
            scales = cache.scales and tuple(stack[layer] for stack in cache.scales)
            return KeysValues(cache.k[layer], cache.v[layer], scales)
        return KeysValues(self.k, self.v, self.scales, layer)


def init_cache(config: TextConfig, batch: int, slots: int, dtype: Any, *, stacked: bool = True) -> KVCache:
    """An empty cache of `slots` tokens for `batch` rows; dtype int8 keeps a scale beside each token's k and v."""
    per_token = (batch, config.num_key_value_heads, slots)

    def zeros(shape: tuple[int, ...], dtype: Any) -> Array | tuple[Array, ...]:
        if stacked:
            return jnp.zeros((config.num_hidden_layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers))

    scaled = jnp.dtype(dtype) == jnp.int8
    return KVCache(
        k=zeros((*per_token, config.head_dim), dtype),
        v=zeros((*per_token, config.head_dim), dtype),
        scales=(zeros(per_token, jnp.float32), zeros(per_token, jnp.float32)) if scaled else None,
        positions=jnp.zeros((batch, slots), jnp.int32),
        valid=jnp.zeros((batch, slots), bool),
        length=jnp.zeros((), jnp.int32),
    )


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped kv heads. x [B,T,D] -> ([B,T,D], cache)."""

    config: TextConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Array, angles: Array, mask: Mask, cache: KVCache | None, layer: Any, fresh: bool
    ) -> tuple[Array, KVCache | None]:
        cfg = self.config
        heads = (cfg.num_attention_heads, cfg.head_dim)
        kv_heads = (cfg.num_key_value_heads, cfg.head_dim)
        axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        bias = cfg.attention_bias
        q = Linear("BTD,DNH->BTNH", (cfg.hidden_size, *heads), axes, self.dtype, bias, name="q_proj")(x)
        k = Linear("BTD,DKH->BTKH", (cfg.hidden_size, *kv_heads), kv_axes, self.dtype, bias, name="k_proj")(x)
        v = Linear("BTD,DKH->BTKH", (cfg.hidden_size, *kv_heads), kv_axes, self.dtype, bias, name="v_proj")(x)
        q = constrain(q, "batch", None, "heads", None)
        k, v = (constrain(y, "batch", None, "kv_heads", None) for y in (k, v))
        q, k = apply_rope(q, angles), apply_rope(k, angles)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        if cache is not None:
            cache = cache.append(layer, k, v)
        if cache is None or fresh:
            y = attention(q, k, v, mask)
        else:
            keys = cache.read(layer)
            y = attention(q, keys.k, keys.v, mask, keys.layer, scales=keys.scales)
        axes = ("heads", "head_dim", "embed")
        y = Linear("BTNH,NHD->BTD", (*heads, cfg.hidden_size), axes, self.dtype, bias, name="o_proj")(y)
        return constrain(y, "batch", None, None), cache


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)). x [B,T,D] -> [B,T,D]."""

    config: TextConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        wide = (cfg.hidden_size, cfg.intermediate_size)
        gate = Linear("BTD,DF->BTF", wide, ("embed", "mlp"), self.dtype, cfg.mlp_bias, name="gate_proj")(x)
        up = Linear("BTD,DF->BTF", wide, ("embed", "mlp"), self.dtype, cfg.mlp_bias, name="up_proj")(x)
        x = made_again(lambda gate, up: jax.nn.silu(gate) * up)(gate, up)
        x = constrain(x, "batch", None, "mlp")
        narrow = (cfg.intermediate_size, cfg.hidden_size)
        y = Linear("BTF,FD->BTD", narrow, ("mlp", "embed"), self.dtype, cfg.mlp_bias, name="down_proj")(x)
        return constrain(y, "batch", None, None)


class Block(nn.Module):
    """One layer: attention, then MLP, each behind an RMSNorm and added to its input."""

    config: TextConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Array, angles: Array, mask: Mask, cache: KVCache | None = None, layer: Any = 0, fresh: bool = False
    ) -> tuple[Array, KVCache | None]:
        cfg = self.config
        h = RMSNorm((cfg.hidden_size,), cfg.rms_norm_eps, name="input_layernorm")(x)
        h, cache = Attention(cfg, self.dtype, name="self_attn")(h, angles, mask, cache, layer, fresh)
        x = x + h
        h = RMSNorm((cfg.hidden_size,), cfg.rms_norm_eps, name="post_attention_layernorm")(x)
        return x + Mlp(cfg, self.dtype, name="mlp")(h), cache


def init_params(key: Array, config: TextConfig) -> Params:
    """Random float32 parameters, layers stacked; lm_head is absent where the embeddings serve as head."""
    k_embed, k_layers, k_head = jax.random.split(key, 3)
    x = jnp.zeros((1, 2, config.hidden_size))
    angles = jnp.zeros((1, 2, config.head_dim // 2))
    mask = self_mask(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    normal = nn.initializers.normal(0.02)
    params = {
        "embed_tokens": {
            "embedding": declared(normal(k_embed, (config.vocab_size, config.hidden_size)), "vocab", "embed")
        },
        "layers": init_stack(Block(config, jnp.float32), k_layers, config.num_hidden_layers, x, angles, mask),
        "norm": {"scale": declared(jnp.ones(config.hidden_size), "embed_vector")},
    }
    if not config.tie_word_embeddings:
        kernel = normal(k_head, (config.hidden_size, config.vocab_size))
        params["lm_head"] = {"kernel": declared(kernel, "embed", "vocab")}
    return params


def cache_specs(cache: KVCache) -> KVCache:
    """How a cache lies over the mesh: rows along BATCH, kv heads along TENSOR. A KVCache of PartitionSpecs."""

    def heads(stack: Any, axes: tuple[str | None, ...]) -> Any:
        return tuple(logical_spec(*axes[1:]) for _ in stack) if isinstance(stack, tuple) else logical_spec(*axes)

    return KVCache(
        k=heads(cache.k, CACHE_AXES),
        v=heads(cache.v, CACHE_AXES),
        positions=logical_spec("batch", None),
        valid=logical_spec("batch", None),
        length=P(),
        scales=cache.scales and tuple(heads(stack, CACHE_AXES[:-1]) for stack in cache.scales),
    )


def embed(params: Params, token_ids: Array, dtype: Any) -> Array:
    """Token embeddings. token_ids [B,T] int32 -> [B,T,D] in `dtype`."""
    x = jnp.take(params["embed_tokens"]["embedding"], token_ids, axis=0).astype(dtype)
    return constrain(x, "batch", None, None)


def forward(
    params: Params,
    config: TextConfig,
    x: Array,
    positions: Array,
    valid: Array,
    cache: KVCache | None = None,
    *,
    fresh: bool = False,
    dtype: Any = jnp.float32,
    collect: bool = False,
    remat: Remat = False,
    segments: Array | None = None,
) -> tuple[Array, KVCache | None, dict[str, Array]]:
    """Read embeddings, after those that the cache holds.

    x [B,T,D]; positions [B,T] int32, not falling along a row; valid [B,T] bool (False: padding, attended by nobody).
    fresh: the cache is empty, so attention needs to look at these T tokens only (prefill). Positions at or
    beyond max_position_embeddings, and tokens beyond the cache's slots, are the caller's to refuse: neither can raise
    under jit.
    remat: as run_layers takes it. segments [B,T] int32, without a cache: samples that share a row (self_mask);
    positions then restart at each.
    Returns the hidden states after the final norm [B,T,D], the cache with T more slots written, and `out`: with
    collect, "hidden_states" [1+L,B,T,D] as transformers counts them: the input, each layer's output, and last the
    normalised one in place of the last layer's.
    """
    x = x.astype(dtype)
    angles = rope_angles(positions, rope_frequencies(config))
    if cache is not None:
        cache = cache.note(positions, valid)
    if cache is None or fresh:
        mask = self_mask(positions, valid, segments)
    else:
        mask = cache_mask(positions, cache.positions, cache.valid)
    block = Block(config, dtype)

    def apply(carry: tuple[Array, KVCache | None], layer: Params, extra: tuple[Any, None]) -> tuple[Any, Array | None]:
        x, cache = carry
        x, cache = block.apply({"params": layer}, x, angles, mask, cache, extra[0], fresh)
        return (x, cache), x if collect else None

    (last, cache), states = run_layers(apply, params["layers"], (x, cache), remat=remat)
    if cache is not None:
        cache = cache.replace(length=cache.length + x.shape[1])
    norm = RMSNorm((config.hidden_size,), config.rms_norm_eps)
    hidden = norm.apply({"params": params["norm"]}, last)
    out = {"hidden_states": jnp.concatenate([x[None], states[:-1], hidden[None]])} if collect else {}
    return hidden, cache, out


def head(params: Params) -> Params:
    """The part of the parameters that `logits` reads: lm_head, or the embeddings where they are tied."""
    name = "lm_head" if "lm_head" in params else "embed_tokens"
    return {name: params[name]}


def logits(params: Params, config: TextConfig, hidden: Array) -> Array:
    """The language model's head. hidden [...,D] -> float32 [...,V].

    V is what the parameters hold: beyond config.vocab_size, where rows were added for a mesh, logits are MASK_VALUE.
    """
    dtype = hidden.dtype
    if "lm_head" in params:
        kernel, eqn = params["lm_head"]["kernel"], "...D,DV->...V"
    else:
        kernel, eqn = params["embed_tokens"]["embedding"], "...D,VD->...V"
    y = product(eqn, hidden, kernel, dtype, preferred_element_type=jnp.float32)
    y = constrain(y, "batch", *[None] * (y.ndim - 2), "vocab")
    vocabulary = y.shape[-1]
    return (
        y if vocabulary == config.vocab_size else jnp.where(jnp.arange(vocabulary) < config.vocab_size, y, MASK_VALUE)
    )


def rope_frequencies(config: TextConfig) -> np.ndarray:
    """Inverse rotary frequencies [H/2], float32, with the config's scaling (formulas as in transformers)."""
    # float32 throughout, as torch computes them: the exponents and the power, not only the result.
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor)
    # llama3: long wavelengths are stretched, short ones kept, those between interpolated.
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (frequencies * ((1 - smooth) / scaling.factor + smooth)).astype(np.float32)
