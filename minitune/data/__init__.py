"""Rows to micro-batches: read a file, split it, tokenise and label each row (dataset.py, labels.py), and lay rows end to end
(batches.py). Not here: kinds of rows and templates (formats/), downloads (hub.py), the loss (train.py)."""

from minitune.data.batches import Batch, batches, collate, order
from minitune.data.dataset import Dataset, load, load_for
from minitune.data.labels import IGNORED, Example
from minitune.formats.files import read_rows

__all__ = ["IGNORED", "Batch", "Dataset", "Example", "batches", "collate", "load", "load_for", "order", "read_rows"]
