"""Reads a model's config.json key by key: every key is used, known and without effect here, or an error."""

import math

# Keys without effect on the logits of a forward pass: bookkeeping, generation defaults, what Hugging Face's code
# chooses.
IGNORED = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path auto_map use_cache
    initializer_range bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    decoder_start_token_id tokenizer_class pretraining_tp attn_implementation _attn_implementation
    _attn_implementation_autoset use_flash_attn flash_attn fused_dense quantization_config output_attentions
    output_hidden_states return_dict torchscript use_bfloat16 tf_legacy_loss pruned_heads chunk_size_feed_forward
    is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder max_length
    min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens finetuning_task
    id2label label2id num_labels task_specific_params problem_type prefix unsloth_fixed unsloth_version
    max_sequence_length is_llama_config _flash_attn_2_enabled transformers.js_config
""".split()
)


class Reader:
    """One config.json, given as a dict. `done` refuses the keys that nobody asked for."""

    def __init__(self, raw, family):
        self.raw, self.family, self.seen = raw, family, set(IGNORED)

    def value(self, key, default, kinds, expected):
        """The value of a key, or `default` where it is missing. null passes where the default is None."""
        self.seen.add(key)
        value = self.raw.get(key, default)
        if value is None and default is None:
            return None
        if not isinstance(value, kinds) or isinstance(value, bool) != (kinds is bool):
            raise ValueError(f"config.json: {key} is {value!r}, expected {expected}")
        return value

    def integer(self, key, default, null=False):
        """A whole number above 0. null: whether null is allowed although there is a default."""
        if null and self.raw.get(key, default) is None:
            default = None
        value = self.value(key, default, int, "a whole number above 0")
        if value is not None and value < 1:
            raise ValueError(f"config.json: {key} is {value!r}, expected a whole number above 0")
        return value

    def groups(self, key, default, heads):
        """The number of key-value heads, null for as many as `heads`, which must be a multiple of it."""
        count = self.integer(key, default, null=True) or heads
        if heads % count:
            raise ValueError(f"config.json: num_attention_heads is {heads}, expected a multiple of {key}, {count}")
        return count

    def number(self, key, default):
        value = self.value(key, default, (int, float), "a number")
        if not 0 <= value < math.inf:
            raise ValueError(f"config.json: {key} is {value!r}, expected a number, 0 or more")
        return value

    def boolean(self, key, default):
        return self.value(key, default, bool, "true or false")

    def only(self, key, *allowed):
        """The value of a key that this architecture takes in these forms only; the first is what a missing key
        means."""
        self.seen.add(key)
        value = self.raw.get(key, allowed[0])
        if value not in allowed:
            shown = " or ".join("null" if a is None else repr(a) for a in allowed)
            raise ValueError(
                f"config.json: {key} is {value!r}; minitune's {self.family} takes {shown}. "
                f"Use another checkpoint, or add it to minitune/models/{self.family}.py"
            )
        return value

    def ignore(self, *keys):
        """Keys that this architecture has, and that change nothing here."""
        self.seen |= set(keys)

    def rope(self, read):
        """What `read` makes of the rope keys, old spelling or new."""
        self.seen |= {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
        try:
            return read(self.raw)
        except (ValueError, TypeError) as error:
            raise ValueError(f"config.json: {error}") from None

    def done(self, config):
        """Returns `config`, or raises ValueError with the keys that were not read."""
        if unknown := sorted(set(self.raw) - self.seen):
            shown = ", ".join(f"{key}={self.raw[key]!r}" for key in unknown[:5])
            raise ValueError(
                f"config.json has keys that minitune's {self.family} does not know: {shown}. They may change "
                f"the model: support them in minitune/models/{self.family}.py, or remove them if they do not"
            )
        return config
