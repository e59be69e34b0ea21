"""The decoding options of a checkpoint: generation_config.json, or the same keys of config.json if there is no such file. As in
transformers, they apply where the user gives no option. Not here: end tokens (tokenizer.py)."""

from dataclasses import dataclass, fields, make_dataclass

from minitune.config import arg, check_types
from minitune.decoding.options import GenerateConfig
from minitune.schema import COUNT, TOKEN_ID, Number
from minitune.screen import short, some

IDS = (None, [TOKEN_ID])
WHOLE = Number(-(2**63), 2**63 - 1, is_whole=True)
SHAPES = {  # keys that minitune applies
    "max_new_tokens": (None, COUNT),
    "min_new_tokens": (None, WHOLE),
    "max_length": (None, COUNT),
    "min_length": (None, WHOLE),
    "num_beams": (None, COUNT),
    "do_sample": (None, bool),
    "temperature": (None, float),
    "top_k": (None, WHOLE),
    "top_p": (None, float),
    "min_p": (None, float),
    "typical_p": (None, float),
    "repetition_penalty": (None, float),
    "no_repeat_ngram_size": (None, WHOLE),
    "length_penalty": (None, float),
    "early_stopping": (None, bool, {"never"}),
    "num_return_sequences": (None, COUNT),
    "stop_strings": (None, str, [str]),
    "bad_words_ids": (None, [[TOKEN_ID]]),
    "suppress_tokens": IDS,
    "begin_suppress_tokens": IDS,
    "forced_bos_token_id": (None, TOKEN_ID),
    "forced_eos_token_id": (None, TOKEN_ID, [TOKEN_ID]),
    "renormalize_logits": (None, bool),
}
NOT_APPLIED = {  # keys that transformers applies and minitune does not -> values without effect
    "constraints": (None,),
    "diversity_penalty": (None, 0.0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1.0),
    "max_time": (None,),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0.0),
    "sequence_bias": (None,),
    "token_healing": (None, False),
    "top_h": (None,),
    "watermarking_config": (None,),
}
OFF_BELOW_1 = ("min_new_tokens", "min_length", "no_repeat_ngram_size")  # values below 1 mean off, as in transformers
IDS_OF_TOKENS = ("bad_words_ids", "forced_bos_token_id", "forced_eos_token_id")  # their ids must exist in the model
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")  # ignored without sampling
OPTIONS = [f for f in fields(GenerateConfig) if f.metadata.get("is_option", True)]
FROM_FILE = {"stop_strings": "stop"}  # key of the file -> name of the option, if they differ


def unset(f):
    """(name, type, field) of a GenerateConfig field as an option whose default is None, 'not given'."""
    if f.name not in SHAPES and f.name not in FROM_FILE.values():
        return f.name, f.type, arg(f.default, **f.metadata)
    return f.name, f.type | None, arg(None, **f.metadata, otherwise=f.default)


@dataclass(frozen=True)
class DecodingOptions(make_dataclass("Options", map(unset, OPTIONS), frozen=True)):
    """The options of GenerateConfig as the user gives them. None: the value in generation_config.json, else the default."""

    generation_config: str = arg(
        "auto",
        "auto: for decoding options that are not given, use the model's generation_config.json, as in transformers; none: do "
        "not use it",
        choices=("auto", "none"),
        group="decoding: an option that is not given has the value in the model's generation_config.json, else the default",
    )

    def __post_init__(self):
        check_types(self)
        # Refuse bad options before a model is loaded. max_new_tokens and num_beams may still come from a file, so the checks
        # against them must pass here.
        alone = {name: value for name, value in self.given().items() if name != "num_return_sequences"}
        GenerateConfig(**{"max_new_tokens": 2**63 - 1} | alone)

    def given(self):
        """{name: value} of the options that were given."""
        values = {f.name: getattr(self, f.name) for f in OPTIONS}
        return {name: value for name, value in values.items() if value is not None}


def settle(options, folder, tokenizer, say, **weaker):
    """The GenerateConfig for a checkpoint. Prints what the checkpoint changes.

    options: a DecodingOptions. folder: a ModelFolder. tokenizer: its end tokens are used if the options name none. say: prints
    one line. weaker: defaults of a job in place of GenerateConfig's. The options override generation_config.json, which
    overrides `weaker`. Raises ValueError if the values exclude each other."""
    rows = max(tokenizer.vocab_size, folder.vocab_size)
    given = {"eos_ids": tuple(i for i in tokenizer.eos_ids if i < (folder.vocab_size or rows))} | options.given()
    if beyond := [i for i in options.eos_ids or () if i >= rows]:
        raise ValueError(f"eos_ids is {some(beyond)}, but {folder.path} has the tokens 0 to {rows - 1:,}")
    path, stored, passed_over = (folder.path, {}, []) if options.generation_config == "none" else read(folder)
    for length in ("max", "min"):  # an option overrides both spellings of a length
        if f"{length}_new_tokens" in given or f"{length}_new_tokens" in stored:
            stored.pop(f"{length}_length", None)
    stored = {name: value for name, value in stored.items() if name not in given}
    if not (weaker | stored | given).get("do_sample"):
        stored = {name: value for name, value in stored.items() if name not in SAMPLING}
    check_ids(stored, path, folder.vocab_size or rows)
    if "max_length" in stored:
        weaker = weaker | {"max_new_tokens": stored["max_length"]}
    if "min_new_tokens" in stored:
        longest = (weaker | stored | given).get("max_new_tokens", GenerateConfig.max_new_tokens)
        stored["min_new_tokens"] = min(stored["min_new_tokens"], longest)
    try:
        found = GenerateConfig(**weaker | stored | given)
    except ValueError as error:
        GenerateConfig(**weaker | given)  # raises its own message if the options alone are wrong
        raise ValueError(f"{path}: {error} (--generation-config none ignores this file)") from None
    meaning, plain = found.meaning(), GenerateConfig()
    values = {name: v for name, v in stored.items() if getattr(meaning, name) != weaker.get(name, getattr(plain, name))}
    if values:
        words = ", ".join(f"{name} {short(value)}" for name, value in values.items())
        say(f"decoding defaults from {path.name}: {words} (--generation-config none turns them off)")
    if passed_over:
        say(
            f"warning: {path} sets {some(passed_over)}, which minitune does not support; answers may differ from transformers"
        )
    return found


def check_ids(stored, path, rows):
    """Raises ValueError if a forced or banned token does not exist in the model, as transformers does.

    stored: {field: value} of the file at `path`. rows: number of tokens of the model."""
    for name in IDS_OF_TOKENS:
        ids = stored.get(name) or ()
        ids = (
            (ids,) if isinstance(ids, int) else (i for one in ids for i in (one if isinstance(one, tuple) else (one,)))
        )
        if beyond := [i for i in ids if i >= rows]:
            raise ValueError(
                f"{path}: {name} has {some(beyond)}, but the model has the tokens 0 to {rows - 1:,} "
                "(--generation-config none ignores this file)"
            )


def read(folder):
    """(Path of the file, {field of GenerateConfig: value}, keys in it that change answers and are not applied).

    folder: a ModelFolder. Raises ValueError with the file and the key if a value has the wrong type."""
    path = folder.path / "generation_config.json"
    if not path.is_file():
        path = folder.path / "config.json"
    content = folder.json(path.name, {f"{key}?": shape for key, shape in SHAPES.items()})
    values = {FROM_FILE.get(key, key): content[key] for key in SHAPES if content.get(key) is not None}
    values = {key: value for key, value in values.items() if key not in OFF_BELOW_1 or value > 0}
    for name in ("stop", "forced_eos_token_id"):
        if isinstance(values.get(name), str | int):
            values[name] = [values[name]]
    if "bad_words_ids" in values:
        if not all(values["bad_words_ids"]):
            raise ValueError(f"{path}: bad_words_ids has an empty list, expected lists of token ids")
        values["bad_words_ids"] = map(tuple, values["bad_words_ids"])
    for name in ("stop", "forced_eos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"):
        if name in values:
            values[name] = tuple(values[name])
    return path, values, [key for key, idle in NOT_APPLIED.items() if key in content and content[key] not in idle]
