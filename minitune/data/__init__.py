"""From a file of rows to micro-batches: read and split the file (dataset.py), tokenise and label each row (labels.py), pack rows
into batches (batches.py). Not here: formats of rows and templates (formats/), downloads (hub.py), the loss (loss.py)."""

from minitune.data.batches import Batch, batches, collate, order
from minitune.data.dataset import Dataset, load, load_for
from minitune.data.labels import IGNORED, Example
from minitune.formats.files import read_rows

__all__ = ["IGNORED", "Batch", "Dataset", "Example", "batches", "collate", "load", "load_for", "order", "read_rows"]
