"""The names of the study's files: MODEL_topk50_nb5_t1 and the like."""

from dataclasses import fields

from minitune.decoding.options import GenerateConfig

SHORT = {"top_k": "topk", "num_beams": "nb", "temperature": "t"}
NAMED = (  # options that change answers and are named where they are not at their default
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "length_penalty",
    "early_stopping",
    "seed",
)


def point_name(config, others=()):
    """The name of a decoding: the study's, topk50_nb5_t1, where tokens are drawn; greedy or beam5 where none are. Behind it is
    what is not at its default, topk50_nb1_t1_topp0.9, and what `others` names: options that are varied.

    The longest answer is not in it: two files of one name are never mixed, since a file says its settings."""
    named = SHORT if config.do_sample else {}
    words = [f"{short_name}{written(getattr(config, name))}" for name, short_name in named.items()]
    if not config.do_sample:
        words = ["greedy" if config.num_beams == 1 else f"beam{config.num_beams}"]
        named = {"num_beams": "nb"}
    meaning, default = config.meaning(), {f.name: f.default for f in fields(GenerateConfig)}
    set_apart = [name for name in NAMED if name in default and getattr(meaning, name) != default[name]]
    extra = dict.fromkeys(name for name in (*set_apart, *others) if name not in named)
    return "_".join(
        [*words, *(f"{SHORT.get(name, name.replace('_', ''))}{written(getattr(config, name))}" for name in extra)]
    )


def written(value):
    return f"{value:g}" if isinstance(value, float) else str(value)
