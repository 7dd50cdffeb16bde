"""LLaMA (Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023) as a Flax module."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.config import TextConfig
from internvl_jax.models import cpu
from internvl_jax.models.attention import Mask, attention, cache_mask, self_mask
from internvl_jax.models.kv_cache import KeysValues, KVCache
from internvl_jax.models.layers import (
    MASK_VALUE,
    Array,
    Embedding,
    Head,
    Linear,
    Params,
    RMSNorm,
    Rope,
    Variables,
    apply_rope,
    project,
    rope_tables,
)
from internvl_jax.models.stack import LayerStack, Remat
from internvl_jax.parallel.mesh import kv_copies
from internvl_jax.parallel.partitioning import axis_devices, constrain


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped kv heads. x [B,T,D] -> ([B,T,D], cache).

    On a mesh, parameters may have more query heads than the config, and keys and values are repeated where kv heads
    are fewer than the tensor axis (`param_sharding`). What a padded head computes is dropped before o_proj, whose rows
    would get a gradient from it: unlike its query, its keys and values are not zero.
    """

    config: TextConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Array, rope: Rope, mask: Mask, cache: KVCache | None, layer: Any, fresh: bool
    ) -> tuple[Array, KVCache | None]:
        cfg = self.config
        heads = (cfg.num_attention_heads, cfg.head_dim)
        kv_heads = (cfg.num_key_value_heads, cfg.head_dim)
        axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        bias = cfg.qkv_bias
        q_proj = Linear("BTD,DNH->BTNH", (cfg.hidden_size, *heads), axes, self.dtype, bias, name="q_proj")
        k_proj = Linear("BTD,DKH->BTKH", (cfg.hidden_size, *kv_heads), kv_axes, self.dtype, bias, name="k_proj")
        v_proj = Linear("BTD,DKH->BTKH", (cfg.hidden_size, *kv_heads), kv_axes, self.dtype, bias, name="v_proj")
        q, k, v = project(x, q_proj, k_proj, v_proj)
        q = constrain(q, "batch", None, "heads", None)
        k, v = (constrain(y, "batch", None, "kv_heads", None) for y in (k, v))
        if cfg.qk_norm:
            q = RMSNorm((cfg.head_dim,), cfg.rms_norm_eps, ("head_dim",), name="q_norm")(q)
            k = RMSNorm((cfg.head_dim,), cfg.rms_norm_eps, ("head_dim",), name="k_norm")(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        copies = kv_copies(cfg.num_key_value_heads, axis_devices("kv_heads"))
        if copies > 1:
            k, v = (constrain(jnp.repeat(y, copies, axis=1), "batch", "kv_heads", None, None) for y in (k, v))
        if cache is not None:
            cache = cache.append(layer, k, v)
        if cache is None or fresh:
            y = attention(q, KeysValues(k, v), mask)
        else:
            y = attention(q, cache.read(layer), mask)
        if y.shape[2] > cfg.num_attention_heads:
            group, true = (heads // cfg.num_key_value_heads for heads in (y.shape[2], cfg.num_attention_heads))
            y = jnp.where((jnp.arange(y.shape[2]) % group < true)[:, None], y, 0)
        axes = ("heads", "head_dim", "embed")
        output = (*heads, cfg.hidden_size)
        y = Linear("BTNH,NHD->BTD", output, axes, self.dtype, cfg.attention_bias, name="o_proj")(y)
        return constrain(y, "batch", "tokens", None), cache


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)). x [B,T,D] -> [B,T,D]."""

    config: TextConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        wide = (cfg.hidden_size, cfg.intermediate_size)
        gate_proj = Linear("BTD,DF->BTF", wide, ("embed", "mlp"), self.dtype, cfg.mlp_bias, name="gate_proj")
        up_proj = Linear("BTD,DF->BTF", wide, ("embed", "mlp"), self.dtype, cfg.mlp_bias, name="up_proj")
        gate, up = project(x, gate_proj, up_proj)
        x = cpu.remat_cheap(lambda gate, up: jax.nn.silu(gate) * up)(gate, up)
        x = constrain(x, "batch", None, "mlp")
        narrow = (cfg.intermediate_size, cfg.hidden_size)
        y = Linear("BTF,FD->BTD", narrow, ("mlp", "embed"), self.dtype, cfg.mlp_bias, name="down_proj")(x)
        return constrain(y, "batch", "tokens", None)


class Block(nn.Module):
    """One layer: attention, then MLP, each behind an RMSNorm and added to its input."""

    config: TextConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Array, rope: Rope, mask: Mask, cache: KVCache | None = None, layer: Any = 0, fresh: bool = False
    ) -> tuple[Array, KVCache | None]:
        cfg = self.config
        h = RMSNorm((cfg.hidden_size,), cfg.rms_norm_eps, name="input_layernorm")(x)
        h, cache = Attention(cfg, self.dtype, name="self_attn")(h, rope, mask, cache, layer, fresh)
        x = x + h
        h = RMSNorm((cfg.hidden_size,), cfg.rms_norm_eps, name="post_attention_layernorm")(x)
        return x + Mlp(cfg, self.dtype, name="mlp")(h), cache


class Llama(nn.Module):
    """The language model: embeddings, layers, final norm and head, with parameters named as transformers names them.

    Attributes:
        config: sizes of the model.
        dtype: of computation; parameters are cast where they are used.
        remat: what the backward pass recomputes of each layer.
    """

    config: TextConfig
    dtype: Any = jnp.float32
    remat: Remat = False

    def setup(self) -> None:
        cfg = self.config
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, self.dtype)
        self.stack = LayerStack(partial(Block, cfg, self.dtype), cfg.num_hidden_layers, self.remat)
        nn.share_scope(self, self.stack)
        self.norm = RMSNorm((cfg.hidden_size,), cfg.rms_norm_eps)
        if not cfg.tie_word_embeddings:
            self.lm_head = Head(cfg.hidden_size, cfg.vocab_size)

    def __call__(
        self,
        x: Array,
        positions: Array,
        valid: Array,
        cache: KVCache | None = None,
        *,
        fresh: bool = False,
        segments: Array | None = None,
        collect: bool = False,
    ) -> Any:
        """Run the layers and the final norm on embeddings, after the tokens that the cache holds.

        Under jit nothing can raise, so the caller refuses positions at or beyond the context (TextConfig.context), and
        more tokens than the cache has slots for.

        Args:
            x: embeddings [B,T,D].
            positions: [B,T] int32, not falling along a row (along a segment, with `segments`).
            valid: [B,T] bool; False is padding, which nothing attends to.
            cache: keys and values of earlier tokens.
            fresh: the cache is empty, so attention is among these T tokens only (prefill).
            segments: [B,T] int32, samples that share a row; without a cache only.
            collect: also return `out`.

        Returns:
            Hidden states [B,T,D], the cache with T more slots, and with `collect` a dict with "hidden_states"
            [1+L,B,T,D] as transformers counts them: the input, the output of each layer, and last the normalized
            hidden state in place of the last layer's.
        """
        x = x.astype(self.dtype)
        extended = self.config.extends_context
        frequencies = extended_frequencies(self.config, positions) if extended else rope_frequencies(self.config)
        rope = rope_tables(positions, frequencies, self.dtype)
        if cache is not None:
            cache = cache.append_positions(positions, valid)
        if cache is None or fresh:
            mask = self_mask(positions, valid, segments)
        else:
            mask = cache_mask(positions, cache.positions, cache.valid)

        def step(block: Callable[..., Any], carry: tuple[Array, KVCache | None], index: Any, _: Any) -> tuple[Any, Any]:
            x, cache = block(carry[0], rope, mask, carry[1], index, fresh)
            return (x, cache), x if collect else None

        (last, cache), states = self.stack(step, (x, cache))
        if cache is not None:
            cache = cache.replace(length=cache.length + x.shape[1])
        hidden = self.norm(last)
        if not collect:
            return hidden, cache
        return hidden, cache, {"hidden_states": jnp.concatenate([x[None], states[:-1], hidden[None]])}

    def embed(self, token_ids: Array) -> Array:
        """Look up token embeddings. token_ids [B,T] int32 -> [B,T,D] in `dtype`."""
        return constrain(self.embed_tokens(token_ids), "batch", "tokens", None)

    def logits(self, hidden: Array) -> Array:
        """Apply the head. hidden [...,D] -> float32 [...,V].

        V is what the parameters hold: logits of rows that were added for a mesh, beyond config.vocab_size, are
        MASK_VALUE.
        """
        y = self.embed_tokens.attend(hidden) if self.config.tie_word_embeddings else self.lm_head(hidden)
        y = constrain(y, "batch", *[None] * (y.ndim - 2), "vocab")
        padded, size = y.shape[-1], self.config.vocab_size
        return y if padded == size else jnp.where(jnp.arange(padded) < size, y, MASK_VALUE)


def next_logits(
    variables: Variables, tokens: Array, positions: Array, valid: Array, cache: KVCache, config: TextConfig, dtype: Any
) -> tuple[Array, KVCache]:
    """Run one token of each row: tokens [B] int32, positions and valid [B,1]. Returns logits [B,V] and the cache."""
    llama = Llama(config, dtype)
    x = llama.apply(variables, tokens[:, None], method="embed")
    hidden, cache = llama.apply(variables, x, positions, valid, cache)
    return llama.apply(variables, hidden[:, 0], method="logits"), cache


def head(params: Params) -> Params:
    """The part of the language model's parameters that `Llama.logits` reads: lm_head, or tied embeddings."""
    name = "lm_head" if "lm_head" in params else "embed_tokens"
    return {name: params[name]}


def extended_frequencies(config: TextConfig, positions: Array) -> Array:
    """Frequencies of dynamic NTK, which beyond max_position_embeddings fall with a row's length.

    As in the published code, keys in a cache keep the rotation of the length at which they were written. There the
    length is the longest one that the module has ever seen, of any row; here a row's answer depends on itself alone.

    Args:
        config: sizes of the model and its rope_scaling.
        positions: [B,T], of which the largest of a row is the last token's.

    Returns:
        [B,1,H/2] float32.
    """
    if config.rope_scaling is None:  # extends_context says that there is one
        raise ValueError("dynamic NTK needs a rope_scaling")
    factor, dim = config.rope_scaling.factor, config.head_dim
    length = (jnp.max(positions, axis=1) + 1).astype(jnp.float32)
    growth = jnp.maximum(factor * length / config.max_position_embeddings - (factor - 1), 1.0)
    # base * growth ** (H / (H - 2)) raised to -i / H; in this form exact without growth, and nearly so in float32.
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim - 2)
    return jnp.asarray(rope_frequencies(config)) * jnp.exp(-exponents * jnp.log(growth)[:, None, None])


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
    original, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    if original is None or low is None or high is None:  # RopeScaling refuses it
        raise ValueError("rope scaling llama3 lacks a factor")
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (frequencies * ((1 - smooth) / scaling.factor + smooth)).astype(np.float32)
