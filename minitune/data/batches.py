"""Packs examples into micro-batches: all rows of a micro-batch lie in one sequence of N tokens, and `documents` gives their
lengths. Padding is one more document at the end. It is known by its position, so the pad token may equal the end token."""

from dataclasses import dataclass

import numpy as np
import torch

from minitune.data.labels import IGNORED, count_supervised

MEGA_BATCH = 50  # micro-batches that are sorted by length together, as in transformers


@dataclass(frozen=True)
class Batch:
    """A micro-batch: packed rows. If there is padding, it is the last document; it has no entry in `rows`."""

    input_ids: torch.Tensor  # (1, N) int64
    labels: torch.Tensor  # (1, N) int64, label of the token at the same position (not shifted), or IGNORED
    documents: list[int]  # length of each document; they sum to N
    rows: list[int]  # index in the file of each document, without the padding
    supervised: int  # number of tokens that are predicted and have a label

    def targets(self):
        """(positions, next_tokens), both (supervised,) int64: the positions that a supervised token follows, and that token.

        The first token of a document is never a target, since it would be predicted from another document."""
        is_first = torch.zeros(self.labels.shape[1], dtype=torch.bool)
        is_first[np.cumsum([0, *self.documents[:-1]]).tolist()] = True
        predicted = ((self.labels[0] != IGNORED) & ~is_first).nonzero()[:, 0]
        return predicted - 1, self.labels[0, predicted]


def collate(examples, pad_id, multiple=8):
    """Pack a list of Examples into one Batch, padded with pad_id to a multiple of `multiple` tokens (8 for tensor cores)."""
    ids = [i for e in examples for i in e.ids]
    labels = [label for e in examples for label in e.labels]
    documents = [len(e.ids) for e in examples]
    if padding := -len(ids) % multiple:
        ids, labels, documents = ids + [pad_id] * padding, labels + [IGNORED] * padding, [*documents, padding]
    return Batch(
        torch.tensor([ids]),
        torch.tensor([labels]),
        documents,
        [e.row for e in examples],
        sum(count_supervised(e.labels) for e in examples),
    )


def order(lengths, batch_size, seed, epoch, group_by_length=False):
    """The micro-batches of an epoch, as lists of indices into `lengths`. Depends on its arguments only.

    lengths: tokens of each row. group_by_length: sort rows by length within shuffled groups of 50 micro-batches, and put the
    micro-batch with the longest row first, so that a lack of memory shows in the first step. The last micro-batch may be
    smaller."""
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths)).tolist()
    if not group_by_length:
        return [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
    mega = MEGA_BATCH * batch_size
    groups = [sorted(shuffled[i : i + mega], key=lambda j: -lengths[j]) for i in range(0, len(shuffled), mega)]
    micro = [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]
    micro = [micro[i] for i in random.permutation(len(micro))]
    first = max(range(len(micro)), key=lambda i: max(lengths[j] for j in micro[i]), default=0)
    return micro[first : first + 1] + micro[:first] + micro[first + 1 :]


def batches(examples, batch_size, seed, epoch, group_by_length=False, pad_id=0, start=0):
    """Yields the Batches of an epoch from index `start` on. Other arguments as in order() and collate()."""
    for indices in order([len(e.ids) for e in examples], batch_size, seed, epoch, group_by_length)[start:]:
        yield collate([examples[i] for i in indices], pad_id)
