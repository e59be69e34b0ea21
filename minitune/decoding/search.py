"""Beam search for one prompt, with transformers' rules (_beam_search in its generation/utils.py)."""

from dataclasses import dataclass, field

import numpy as np

NEVER = -1e9  # transformers' score of a beam that cannot be chosen


@dataclass
class Answer:
    """One decoded answer.

    ids: token ids without the end token. logprobs: log-probability of each id under the model, before penalties and warpers;
    if an end token ended the answer, its log-probability is last. score: score of beam search, after the length penalty."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended_by: str = "length"  # "eos", "stop" or "length"
    score: float | None = None


def by_length(score, length, penalty):
    """score / length ** penalty in fp32, as transformers computes it."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return float(np.float32(score) / np.float32(np.float64(length) ** penalty))


class Search:
    """The beams of one prompt: the running ones, and the best ended ones."""

    def __init__(self, prompt, beams, limit):
        """prompt: list of ids. beams: number of beams. limit: largest length of an answer, in tokens."""
        self.prompt, self.beams, self.limit, self.length, self.done = prompt, beams, limit, 0, False
        self.tokens = [[] for _ in range(beams)]  # new ids of each running beam
        self.logprobs = [[] for _ in range(beams)]  # and their log-probabilities
        self.scores = [0.0] + [NEVER] * (beams - 1)  # all beams start equal, so only the first one may be chosen
        self.ended = []  # (score, ids, logprobs, ended_by) of the best ended beams, best first, at most `beams`
        self.can_improve = True

    def histories(self):
        """Ids of each running beam, prompt included."""
        return [self.prompt + tokens for tokens in self.tokens]

    def advance(self, decoder, scores, beams, tokens, logprobs):
        """Choose the beams of the next step from the candidates. Returns, for each new beam, the index of the old one that it
        continues.

        decoder: the generate.Decoder, for its options and end tokens. scores, beams, tokens, logprobs: lists with one entry for
        each candidate, best first: summed log-probability, index of the beam that it extends, token, its log-probability."""
        config, n = decoder.config, self.beams
        full = self.length + 1 == self.limit
        ids = [[*self.tokens[beam], token] for beam, token in zip(beams, tokens, strict=True)]
        how = [decoder.ends(new) or ("length" if full else None) for new in ids]
        # Only the n best candidates may become answers; the others only replace those that ended.
        is_full = len(self.ended) == n and config.early_stopping == "yes"
        for i in range(n):
            score = by_length(scores[i], self.length + 1, config.length_penalty)
            if how[i] and self.can_improve and not is_full and score > NEVER:  # a banned token gives NEVER or less
                self.ended.append((score, ids[i], [*self.logprobs[beams[i]], logprobs[i]], how[i]))
        self.ended = sorted(self.ended, key=lambda entry: -entry[0])[:n]
        # As in transformers: lower the scores of the ended candidates, then take the n best of all.
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
        """Whether a running beam may still score above the worst ended one, by the estimate of transformers."""
        if len(self.ended) < self.beams:
            return True
        length = self.length
        if config.early_stopping == "never" and config.length_penalty > 0:
            length = self.limit
        return by_length(self.scores[0], length, config.length_penalty) > self.ended[-1][0]

    def answers(self, count):
        """The `count` best answers. Running beams fill up the list if too few ended, as when all tokens were banned."""
        running = zip(self.scores, self.tokens, self.logprobs, ["length"] * self.beams, strict=True)
        answers = []
        for score, ids, logprobs, how in [*self.ended, *running][:count]:
            answers.append(Answer(ids[:-1] if how == "eos" else ids, logprobs, how, score))
        return answers
