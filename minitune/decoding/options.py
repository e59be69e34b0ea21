"""The options of decoding, with the meaning that they have in transformers."""

from dataclasses import dataclass, fields, replace

from minitune.config import arg, check_types, positive

EARLY = {False: "no", True: "yes"}  # transformers' spelling of early_stopping
IN_FILE = {"is_option": False}  # set by Python code and generation_config.json only


@dataclass(frozen=True)
class GenerateConfig:
    """The options of decoding an answer. Raises ValueError on values that exclude each other."""

    max_new_tokens: int = arg(64, "longest answer, in tokens", low=1)
    min_new_tokens: int = arg(0, "shortest answer, in tokens")
    num_beams: int = arg(1, "number of beams; 1: no beam search", low=1, high=1024)
    do_sample: bool = arg(False, "draw tokens instead of taking the most likely one")
    temperature: float = arg(1.0, "sampling: divide the logits by this number; 0: no sampling")
    top_k: int = arg(50, "sampling: draw from the k most likely tokens; 0: from all")
    top_p: float = arg(
        1.0, "sampling: draw from the fewest most likely tokens whose probabilities sum to this, above 0 to 1"
    )
    min_p: float = arg(0.0, "sampling: smallest probability of a token, relative to the most likely one, 0 to 1")
    repetition_penalty: float = arg(1.0, "above 1: make tokens that already occurred less likely")
    no_repeat_ngram_size: int = arg(0, "no n-gram of this many tokens may occur twice; 0: no limit")
    length_penalty: float = arg(1.0, "beams: divide the score of an answer by its length to this power")
    early_stopping: str = arg(
        "no",
        "beams: when to end. yes: as soon as num_beams answers are complete; no: when a better answer is unlikely; never: "
        "when a better answer is impossible",
        choices=("no", "yes", "never"),
    )
    num_return_sequences: int = arg(1, "answers for each prompt: samples, or the best beams", low=1, high=4096)
    stop: tuple[str, ...] = arg((), "texts that end an answer")
    seed: int = arg(0, "random seed of the sampling")
    lookup: int | None = arg(
        None,
        "greedy decoding of one prompt: guess up to this many tokens from a repeated n-gram and verify them in one step; 0: off; "
        "not set: on if the answer stays bit-identical",
        high=1024,
    )
    eos_ids: tuple[int, ...] | None = arg(None, "token ids that end an answer; not set: those of the checkpoint")
    # Further settings of a checkpoint's generation_config.json; they are not options of the command line.
    max_length: int | None = arg(
        None, "most tokens of prompt and answer together; max_new_tokens applies too", **IN_FILE
    )
    min_length: int | None = arg(None, "fewest tokens of prompt and answer together", **IN_FILE)
    typical_p: float | None = arg(
        None, "sampling: draw from the most typical tokens whose probabilities sum to this", **IN_FILE
    )
    bad_words_ids: tuple[tuple[int, ...], ...] | None = arg(
        None, "sequences of token ids that no answer may contain", **IN_FILE
    )
    suppress_tokens: tuple[int, ...] | None = arg(None, "token ids that no answer may contain", **IN_FILE)
    begin_suppress_tokens: tuple[int, ...] | None = arg(None, "token ids that no answer may begin with", **IN_FILE)
    forced_bos_token_id: int | None = arg(None, "first token of an answer, if the prompt is one token", **IN_FILE)
    forced_eos_token_id: tuple[int, ...] | None = arg(
        None, "possible last tokens of an answer of the largest length", **IN_FILE
    )
    renormalize_logits: bool | None = arg(None, "beams: apply log_softmax again after the penalties", **IN_FILE)

    def __post_init__(self):
        if isinstance(self.early_stopping, bool):  # transformers' spelling
            object.__setattr__(self, "early_stopping", EARLY[self.early_stopping])
        check_types(self)
        positive(self, "repetition_penalty")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected a number above 0 and up to 1")
        if self.typical_p is not None and not 0 < self.typical_p <= 1:
            raise ValueError(f"typical_p is {self.typical_p}, expected a number above 0 and up to 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}, expected a number from 0 to 1")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        if self.num_return_sequences > 1 and not self.samples and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}, but greedy decoding has one answer and beam search "
                f"num_beams={self.num_beams}; sample, or raise num_beams"
            )
        if 0 < self.temperature < 1e-5:
            raise ValueError(f"temperature is {self.temperature}, expected 0 (nothing is drawn) or 0.00001 and more")
        if self.lookup and (self.num_beams > 1 or self.samples):
            raise ValueError("lookup is for greedy decoding; set it to 0 with beams or sampling")
        if "" in self.stop:
            raise ValueError("stop has an empty text, which every answer contains; leave it out")

    @property
    def samples(self):
        """Whether tokens are drawn: do_sample with a temperature above 0."""
        return self.do_sample and self.temperature > 0

    def meaning(self):
        """A copy in which options without effect on this decoding have their defaults. Two configs with equal meaning() decode
        to the same tokens."""
        idle = () if self.samples else ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
        idle += () if self.num_beams > 1 else ("length_penalty", "early_stopping", "renormalize_logits")
        return replace(self, **{f.name: f.default for f in fields(GenerateConfig) if f.name in idle})
