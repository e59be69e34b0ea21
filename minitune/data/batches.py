"""Examples to micro-batches, which have no padded columns. Rows lie in one sequence of N tokens, `documents` gives their lengths,
and padding is one more document at the end, known by its position. So a pad token that is the end token harms nothing."""

from dataclasses import dataclass

import numpy as np
import torch

from minitune.data.labels import IGNORED, count_supervised

MEGA_BATCH = 50  # micro-batches that are sorted by length together, as in transformers


@dataclass(frozen=True)
class Batch:
    """A micro-batch: rows laid end to end. The padding, where there is any, is the last document and not in `rows`."""

    input_ids: torch.Tensor  # (1, N) int64
    labels: torch.Tensor  # (1, N) int64, the label of the token at the same place, IGNORED where not supervised
    documents: list[int]  # lengths, N in sum
    rows: list[int]  # index in the file of each document but the padding
    supervised: int  # tokens that are predicted and have a label

    def targets(self):
        """(positions, next_tokens), both (supervised,) int64: where a supervised token follows, and that token.

        The shift stays inside documents: the first token of one is never predicted from the last of another."""
        is_first = torch.zeros(self.labels.shape[1], dtype=torch.bool)
        is_first[np.cumsum([0, *self.documents[:-1]]).tolist()] = True
        predicted = ((self.labels[0] != IGNORED) & ~is_first).nonzero()[:, 0]
        return predicted - 1, self.labels[0, predicted]


def collate(examples, pad_id, multiple=8):
    """Examples end to end as one Batch, with padding up to a multiple of `multiple` tokens (8 for tensor cores)."""
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
    """The micro-batches of an epoch, as lists of indices into `lengths`. A function of its arguments only.

    group_by_length: rows are sorted by length within shuffled groups of 50 micro-batches, and the micro-batch with the
    longest row comes first, so that memory runs out at once or never. A smaller batch that remains is kept."""
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
    """The Batches of an epoch from number `start` on, in the order of order()."""
    for indices in order([len(e.ids) for e in examples], batch_size, seed, epoch, group_by_length)[start:]:
        yield collate([examples[i] for i in indices], pad_id)
