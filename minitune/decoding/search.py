"""The beams of one prompt."""

from dataclasses import dataclass, field

import numpy as np

NEVER = -1e9  # transformers' score of a beam that cannot be chosen


@dataclass
class Answer:
    """One decoded answer. ids: without the end token. logprobs: of each id (and of the end token, last, where there was
    one) under the model itself, before penalties and warpers. score: of beam search, with its length penalty."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended_by: str = "length"  # eos, stop or length
    score: float | None = None


def by_length(score, length, penalty):
    """score / length ** penalty in fp32, as transformers computes it."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return float(np.float32(score) / np.float32(np.float64(length) ** penalty))


class Search:
    """The beams of one prompt: those that go on, and the best that ended."""

    def __init__(self, prompt, beams, limit):
        """limit: of an answer, in tokens."""
        self.prompt, self.beams, self.limit, self.length, self.done = prompt, beams, limit, 0, False
        self.tokens = [[] for _ in range(beams)]  # new ids of the running beams
        self.logprobs = [[] for _ in range(beams)]
        self.scores = [0.0] + [NEVER] * (beams - 1)  # at first all beams are the same one
        self.ended = []  # (score, ids, logprobs, how), the best first, at most `beams`
        self.can_improve = True

    def histories(self):
        return [self.prompt + tokens for tokens in self.tokens]

    def advance(self, decoder, scores, beams, tokens, logprobs):
        """Choose the beams of the next step from the candidates, lists with the best first. Returns the old beam that each new
        one continues."""
        config, n = decoder.config, self.beams
        full = self.length + 1 == self.limit
        ids = [[*self.tokens[beam], token] for beam, token in zip(beams, tokens, strict=True)]
        how = [decoder.ends(new) or ("length" if full else None) for new in ids]
        # The n best candidates may end; the others are there to go on.
        is_full = len(self.ended) == n and config.early_stopping == "yes"
        for i in range(n):
            score = by_length(scores[i], self.length + 1, config.length_penalty)
            if how[i] and self.can_improve and not is_full and score > NEVER:  # not one that took a banned token
                self.ended.append((score, ids[i], [*self.logprobs[beams[i]], logprobs[i]], how[i]))
        self.ended = sorted(self.ended, key=lambda entry: -entry[0])[:n]
        # transformers lowers the scores of those that ended, and takes the n best of all.
        lowered = [score + (NEVER if end else 0.0) for score, end in zip(scores, how, strict=True)]
        chosen = sorted(range(len(ids)), key=lambda i: -lowered[i])[:n]
        self.scores = [lowered[i] for i in chosen]
        self.logprobs = [[*self.logprobs[beams[i]], logprobs[i]] for i in chosen]
        self.tokens = [ids[i] for i in chosen]
        self.length += 1
        self.can_improve = self.can_improve and self.may_improve(config)
        self.done = not self.can_improve or all(how) or (len(self.ended) == n and config.early_stopping == "yes")
        return [beams[i] for i in chosen]

    def may_improve(self, config):
        """Whether a running beam may still score above the worst ended one, by transformers' estimate."""
        if len(self.ended) < self.beams:
            return True
        length = self.length
        if config.early_stopping == "never" and config.length_penalty > 0:
            length = self.limit
        return by_length(self.scores[0], length, config.length_penalty) > self.ended[-1][0]

    def answers(self, decoder, count):
        running = zip(self.scores, self.tokens, self.logprobs, ["length"] * self.beams, strict=True)
        answers = []  # where too few ended, as all tokens were banned, with those that went on
        for score, ids, logprobs, how in [*self.ended, *running][:count]:
            answers.append(Answer(ids[:-1] if how == "eos" else ids, logprobs, how, score))
        return answers
