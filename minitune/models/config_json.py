"""Reads a model's config.json key by key. Each key is used, or known not to change the logits, or reported as unread, or an
error.

A key is an error if transformers reads it for this architecture and minitune does not. A key that neither reads, such as one of
another family, has no effect in either and is reported as unread."""

from dataclasses import replace

from minitune.models.layers import MAX_NUMBER
from minitune.screen import short

MAX = 2**31 - 1  # largest size that is accepted
MAX_LAYERS = 1000  # building the modules of a million layers would take minutes

# Common keys without effect on the logits, which are not reported: bookkeeping, defaults of generation, and choices of
# Hugging Face's own code.
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
    max_sequence_length is_llama_config _flash_attn_2_enabled transformers.js_config _pre_quantization_dtype
    trust_remote_code gradient_checkpointing
""".split()
)


class Reader:
    """Reads the keys of one config.json.

    raw: config.json as a dict. family: the architecture's name, for messages. unread: the keys without effect, to be reported.
    Every method raises ValueError if the value of its key is not supported."""

    def __init__(self, raw, family):
        self.raw, self.family, self.seen, self.unread = raw, family, set(IGNORED), []

    def value(self, key, default, kinds, expected):
        """The value of a key, or `default` if it is missing. null is accepted only if the default is None."""
        self.seen.add(key)
        value = self.raw.get(key, default)
        if value is None and default is None:
            return None
        if not isinstance(value, kinds) or isinstance(value, bool) != (kinds is bool):
            raise ValueError(f"config.json: {key} is {short(value)}, expected {expected}")
        return value

    def integer(self, key, default, null=False, most=MAX):
        """A whole number from 1 to `most`. null: whether null is accepted although the default is a number."""
        if null and self.raw.get(key, default) is None:
            default = None
        expected = f"a whole number from 1 to {most}"
        value = self.value(key, default, int, expected)
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"config.json: {key} is {short(value)}, expected {expected}")
        return value

    def layers(self, key, default):
        """The number of blocks."""
        return self.integer(key, default, most=MAX_LAYERS)

    def groups(self, key, default, heads):
        """The number of key-value heads; null means `heads`. `heads` must be a multiple of it."""
        count = self.integer(key, default, null=True) or heads
        if heads % count:
            raise ValueError(f"config.json: num_attention_heads is {heads}, expected a multiple of {key}, {count}")
        return count

    def number(self, key, default):
        value = self.value(key, default, (int, float), "a number")
        if not 0 <= value <= MAX_NUMBER:
            raise ValueError(f"config.json: {key} is {short(value)}, expected a number from 0 to {MAX_NUMBER:g}")
        return value

    def boolean(self, key, default):
        return self.value(key, default, bool, "true or false")

    def only(self, key, *allowed):
        """The value of a key of which this architecture supports only the values `allowed`. A missing key means the first."""
        self.seen.add(key)
        value = self.raw.get(key, allowed[0])
        if value not in allowed:
            shown = " or ".join("null" if a is None else repr(a) for a in allowed)
            raise ValueError(
                f"config.json: {key} is {short(value)}; minitune's {self.family} takes {shown}. "
                f"Use another checkpoint, or add it to minitune/models/{self.family}.py"
            )
        return value

    def ignore(self, *keys):
        """Keys of this architecture without effect here; they are not reported."""
        self.seen |= set(keys)

    def training(self, key):
        """A dropout rate that transformers applies in training and minitune does not implement."""
        if self.raw.get(key) is not None and self.number(key, 0.0):
            self.unread.append(f"{key} (used in training only; minitune does not implement it)")
        self.seen.add(key)

    def every_model(self, layers, kinds=("full_attention",)):
        """Check the keys that transformers reads for every architecture.

        layers: number of blocks. kinds: the kinds of layers that this architecture supports. Returns the set of kinds in
        layer_types, empty if the file does not have that key."""
        self.only("attribute_map", None, {})
        self.only("per_layer_config", None, {})
        self.only("transformers_weights", None, "model.safetensors")
        named = self.raw.get("layer_types")
        self.seen.add("layer_types")
        if named is None:
            return set()
        if not isinstance(named, list) or len(named) != layers or any(kind not in kinds for kind in named):
            raise ValueError(
                f"config.json: layer_types is {short(named)}; minitune's {self.family} takes a list of {layers} entries, one "
                f"for each layer: {' or '.join(kinds)}"
            )
        return set(named)

    def decoder(self, layers, context, kinds=("full_attention",)):
        """As every_model, with the keys of language models too. context: tokens of the context.

        A window is accepted if it is at least as long as the context, since it then hides nothing."""
        self.only("is_causal", True)
        self.only("kv_sharing_modes", None, [])
        for key in ("decoder", "generator", "text_config"):  # of models with several parts
            self.only(key, None)
        for key in sorted({"sliding_window", "attention_chunk_size"} - self.seen):
            if (window := self.integer(key, None)) is not None and window < context:
                self.only(key, None)
        return self.every_model(layers, kinds)

    def rope(self, read):
        """The Rope of this config. read: a function from the dict to (Rope, unread keys), such as layers.read_rope."""
        self.seen |= {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
        self.seen.add("original_max_position_embeddings")
        try:
            rope, unread = read(self.raw)
        except ValueError as error:
            raise ValueError(f"config.json: {error}") from None
        self.unread += unread
        return rope

    def done(self, config):
        """A copy of `config` whose `unread` lists the keys without effect, with those that nothing has read."""
        return replace(config, unread=(*self.unread, *sorted(set(self.raw) - self.seen)))
