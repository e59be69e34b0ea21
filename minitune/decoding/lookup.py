"""Prompt lookup: guess the next tokens of a greedy answer from where its last n-gram stood before (github.com/apoorvumang/
prompt-lookup-decoding). The model checks a guess in one step, so a wrong one costs a little time and changes nothing."""

SIZES = (3, 2)  # of the n-grams; a single token says too little
FIRST, LONGEST_WAIT = 3, 16


class Lookup:
    """The n-grams of a history of ids, prompt included, and how well guesses went so far.

    at_most: tokens of a guess. A guess grows by two where the last one was right to its end, and shrinks to what was right;
    after one that was all wrong no guess is made for 1, 2, 4, ... steps."""

    def __init__(self, at_most):
        self.at_most, self.size = at_most, min(FIRST, at_most)
        self.places = {}  # n-gram -> where the last and the last but one begins to be followed
        self.read = 0  # ids whose n-grams are known
        self.wait, self.next_wait = 0, 1

    def guess(self, ids, room):
        """Up to `room` ids that may follow."""
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
        """How many ids of the last guess were right."""
        if not guessed:
            return
        if accepted:
            self.size = min(self.at_most, self.size + 2 if accepted == guessed else accepted)
            self.next_wait = 1
        else:
            self.size, self.wait = min(FIRST, self.at_most), self.next_wait
            self.next_wait = min(LONGEST_WAIT, 2 * self.next_wait)
