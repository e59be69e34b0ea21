"""Prompt lookup (github.com/apoorvumang/prompt-lookup-decoding): guess the next tokens of greedy decoding by copying the
tokens that followed an earlier occurrence of the last n-gram. The model verifies a guess in one step, so a wrong guess costs
some time and does not change the output."""

SIZES = (3, 2)  # lengths of the n-grams, tried in this order; single tokens repeat too often to be of use
FIRST, LONGEST_WAIT = 3, 16  # tokens of the first guess; most steps without a guess after wrong ones


class Lookup:
    """Index of the n-grams of a list of ids, prompt included, and the length of the next guess.

    at_most: largest number of tokens of a guess. After a guess that was right as a whole, the next one is two tokens longer;
    after one that was right in part, it is as long as the right part. After a guess without a right token there is none
    for 1, then 2, 4, ... steps."""

    def __init__(self, at_most):
        self.at_most, self.size = at_most, min(FIRST, at_most)
        self.places = {}  # n-gram -> index after its last occurrence, and after the one before that (or None)
        self.read = 0  # number of ids whose n-grams are in `places`
        self.wait, self.next_wait = 0, 1  # steps without a guess: still to come, and after the next wrong guess

    def guess(self, ids, room):
        """At most `room` ids that may follow `ids`, the prompt and the answer so far; [] for no guess."""
        for end in range(self.read + 1, len(ids) + 1):
            for size in SIZES:
                if end >= size:
                    ngram = tuple(ids[end - size : end])
                    self.places[ngram] = end, self.places.get(ngram, (None,))[0]
        self.read = len(ids)
        if self.wait:
            self.wait -= 1
            return []
        for size in SIZES:
            before = self.places[tuple(ids[-size:])][1] if len(ids) >= size else None
            if before is not None:
                return ids[before : before + min(self.size, room)] if room > 0 else []
        return []

    def learn(self, guessed, accepted):
        """Adapt to the result of the last guess: `accepted` of its `guessed` ids were right."""
        if not guessed:
            return
        if accepted:
            self.size = min(self.at_most, self.size + 2 if accepted == guessed else accepted)
            self.next_wait = 1
        else:
            self.size, self.wait = min(FIRST, self.at_most), self.next_wait
            self.next_wait = min(LONGEST_WAIT, 2 * self.next_wait)
