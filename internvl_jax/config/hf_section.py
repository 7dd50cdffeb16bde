"""Reading the JSON objects of a published config.json field by field, so that no field is dropped silently."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from internvl_jax.config.validation import LIMITS, ConfigError, require_size

logger = logging.getLogger(__name__)

NO_DROPOUT = "dropout is not implemented (no published recipe uses it)"

# Fields without effect on the model: those that PretrainedConfig writes into every section (older versions
# GenerationConfig's too), and settings of training, generation or kernels.
_IGNORED = frozenset(
    """_experts_implementation _from_model_config _model_name_or_path _output_attentions assistant_confidence_threshold
    assistant_early_exit assistant_ensemble_weight assistant_lookbehind attn_implementation cache_config
    cache_implementation cls_token_id compile_config compression_config constraints continuous_batching_config
    disable_compile dola_layers encoder_repetition_penalty epsilon_cutoff eta_cutoff experts_implementation
    force_words_ids gradient_checkpointing guidance_scale is_assistant is_composition keys_to_ignore_at_inference
    low_memory mask_token_id max_cache_len max_matching_ngram_size max_new_tokens max_time min_new_tokens min_p
    name_or_path num_assistant_tokens num_assistant_tokens_schedule output_logits penalty_alpha prefill_chunk_size
    prompt_lookup_num_tokens quantization_config renormalize_logits sequence_bias speculation_type stop_strings
    target_lookbehind token_healing top_h unk_token_id use_mtp use_return_dict watermarking_config
    _commit_hash _name_or_path _attn_implementation _attn_implementation_autoset add_cross_attention architectures
    auto_map bad_words_ids begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_factor initializer_range is_decoder is_encoder_decoder label2id layer_scale_init_value length_penalty
    max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache use_flash_attn""".split()
)


@dataclass
class Section:
    """A JSON object that records which fields were read, so that `finish` can name the others."""

    values: Mapping[str, Any]
    where: str  # how error messages name the object
    used: set[str] = field(default_factory=set)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field. Raises ConfigError for a size outside LIMITS."""
        self.used.add(name)
        value = self.values.get(name, default)
        if name in LIMITS and value is not None:
            sides = value if isinstance(value, (list, tuple)) and name in ("image_size", "patch_size") else ()
            for size in sides or [value]:
                require_size(name, size, f"{self.where} has {name} =")
        return value

    def need(self, name: str) -> Any:
        """Return a field. Raises ConfigError where it is missing or null."""
        value = self.get(name)
        if value is None:
            raise ConfigError(f"{self.where} has no {name!r}")
        return value

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Raise ConfigError unless a field has an allowed value; the first one is the default."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise ConfigError(f"{self.where} has {name} = {value!r}: {why}")

    def finish(self, ignored: str = "") -> None:
        """Log a warning that names the fields that were not read, except for `ignored` (separated by spaces)."""
        unknown = sorted(set(self.values) - self.used - _IGNORED - set(ignored.split()))
        if unknown:
            logger.warning("%s: ignored fields: %s", self.where, ", ".join(unknown))


def refuse_quantized(values: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for a quantized checkpoint, whose tensors have other names and dtypes."""
    for name in ("quantization_config", "compression_config"):
        settings = values.get(name)
        if not settings:
            continue
        settings = settings if isinstance(settings, Mapping) else {}
        loaded = settings.get("load_in_4bit") or settings.get("load_in_8bit")
        method = settings.get("quant_method") or ("bitsandbytes" if loaded else "an unnamed method")
        if str(method).startswith("bitsandbytes") and not loaded:
            continue  # written by training with both turned off
        bits = settings.get("bits") or settings.get("w_bit") or (4 if settings.get("load_in_4bit") else None)
        raise ConfigError(
            f"{where} has a {name}: the checkpoint is quantized by {method}{f' ({bits} bits)' if bits else ''}, which "
            "is not supported: use the original checkpoint (convert --quantize int8 or int4 quantizes it)"
        )
    for name in ("vision_config", "text_config", "llm_config"):
        if isinstance(values.get(name), Mapping):
            refuse_quantized(values[name], f"{where}: {name}")
