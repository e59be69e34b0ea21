"""Writes a page that shows the tokens a model is trained on: prompt, supervised and padding tokens of some micro-batches."""

import html
import string
import unicodedata
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path

from minitune import data
from minitune.config import RECIPES, TrainConfig, arg, positive
from minitune.files import write_whole
from minitune.model_folder import ModelFolder
from minitune.screen import printable, say

KINDS = {"p": "prompt", "s": "supervised", "x": "padding"}  # CSS class of a token -> its kind
VISIBLE = {" ": "<wbr><i>·</i>", "\n": "<i>↵</i>\n", "\t": "<i>⇥</i>\t", "\r": "<i>\\r</i>"}


def as_in_training(name):
    """A field of TrainConfig with its default and help text, so that the page shows what a training run would use."""
    trained = TrainConfig.__dataclass_fields__[name]
    return field(default=trained.default, metadata=trained.metadata)


@dataclass(frozen=True)
class InspectConfig:
    """The options of inspect_data.py. Options of training have the same meaning and defaults here."""

    model: str = as_in_training("model")
    revision: str | None = as_in_training("revision")
    data: str | None = as_in_training("data")
    test_data: str | None = as_in_training("test_data")
    test_size: float | None = as_in_training("test_size")
    split_seed: int = as_in_training("split_seed")
    max_length: int = as_in_training("max_length")
    over_length: str = as_in_training("over_length")
    loss_on: str = as_in_training("loss_on")
    special_text: str = as_in_training("special_text")
    batch_size: int = as_in_training("batch_size")
    group_by_length: bool = as_in_training("group_by_length")
    seed: int = as_in_training("seed")
    part: str = arg("train", "rows to show: the training rows, or the held-out rows", choices=("train", "test"))
    epoch: int = arg(0, "epoch whose order of rows is shown, from 0")
    rows: int = arg(12, "number of rows to show, rounded up to whole micro-batches")
    out: str = arg("inspect_data.html", "HTML file to write")

    @staticmethod
    def recipe(values):
        """The part of the recipe of values["model"] about rows and batches, {option: default}."""
        known = {f.name for f in fields(InspectConfig)}
        recipe = RECIPES.get(values.get("model", InspectConfig.model), {})
        return {name: value for name, value in recipe.items() if name in known}

    def __post_init__(self):
        positive(self, "max_length", "batch_size", "rows")
        for name in ("epoch", "seed", "split_seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")


def inspect_data(config, say=say):
    """Write the page and return its Path. Of the model only the tokenizer is read.

    Raises ValueError if rows or tokenizer cannot be read, with the same messages as training."""
    tokenizer = ModelFolder.open(config.model, config.revision, weights=False).tokenizer
    train, test = data.load_for(config, tokenizer)
    dataset = train if config.part == "train" else test
    if not dataset.examples:
        raise ValueError(f"there are no {config.part} rows to show; set test_data or a test_size above 0")
    shown = []
    for batch in data.batches(
        dataset.examples, config.batch_size, config.seed, config.epoch, config.group_by_length, tokenizer.pad_id
    ):
        if sum(len(b.rows) for b in shown) >= config.rows:
            break
        shown.append(batch)
    grouped = ", grouped by length" if config.group_by_length else ""
    notes = [
        train.describe(),
        test.describe() if test.examples else "test: no rows",
        f"tokenizer of {config.model}: {tokenizer.vocab_size:,} ids, begin token "
        f"{name(tokenizer, tokenizer.bos_id)}, end token {name(tokenizer, tokenizer.eos_id)}",
        f"{config.part} rows in the order of epoch {config.epoch} with seed {config.seed}, "
        f"{config.batch_size} rows in a micro-batch{grouped}; loss on {config.loss_on}",
    ]
    write_whole(config.out, page(shown, tokenizer, notes))
    for note in notes[:2]:
        say(note)
    say(f"wrote {config.out}: {sum(len(b.rows) for b in shown)} rows in {len(shown)} micro-batches")
    return Path(config.out)


def page(batches, tokenizer, notes):
    """The page for a list of Batches, as a str. notes: lines of plain text for the top."""
    template = string.Template((Path(__file__).parent / "inspect_data.html").read_text(encoding="utf-8"))
    kinds = [kind for batch in batches for kind in token_kinds(batch)]
    count = {letter: kinds.count(letter) for letter in KINDS}
    share = {letter: f"{n:,} tokens, {n / len(kinds):.1%}" for letter, n in count.items()}
    return template.substitute(
        title="Tokens as they are trained on",
        summary="\n".join(f'<p class="faint">{html.escape(printable(note))}</p>' for note in notes),
        prompt_count=share["p"],
        supervised_count=share["s"],
        padding_count=share["x"],
        bar="".join(f'<span class="{letter}" style="flex:{n}"></span>' for letter, n in count.items()),
        batches="\n".join(batch_section(i, batch, tokenizer) for i, batch in enumerate(batches)),
    )


def token_kinds(batch):
    """The key in KINDS for each token of a Batch, a list. The first token of a row is never predicted, so it is not
    supervised."""
    positions, _ = batch.targets()
    supervised = set((positions + 1).tolist())
    real = sum(batch.documents[: len(batch.rows)])
    return ["x" if t >= real else "s" if t in supervised else "p" for t in range(sum(batch.documents))]


def batch_section(number, batch, tokenizer):
    """HTML of one micro-batch: a heading, and a box for each document in it."""
    kinds, ids, labels = token_kinds(batch), batch.input_ids[0].tolist(), batch.labels[0].tolist()
    boxes = []
    for i, (length, end) in enumerate(zip(batch.documents, accumulate(batch.documents), strict=True)):
        here = range(end - length, end)
        heading = f"row {batch.rows[i]} · {length:,} tokens" if i < len(batch.rows) else f"padding · {length} tokens"
        if i < len(batch.rows):
            heading += f", {sum(kinds[t] == 's' for t in here):,} supervised"
            heading += "" if ids[end - 1] == tokenizer.eos_id else " · truncated: no end token"
        tokens = "".join(token_span(t, ids[t], labels[t], kinds[t], here.start, tokenizer) for t in here)
        boxes.append(f'<article><h3>{heading}</h3><div class="tokens">{tokens}</div></article>')
    counts = f"{len(ids):,} tokens, {batch.supervised:,} supervised, {kinds.count('x')} padding"
    return f"<section><h2>Micro-batch {number} <small>{counts}</small></h2>\n" + "\n".join(boxes) + "</section>"


def token_span(t, token_id, label, kind, start, tokenizer):
    """HTML of one token. t: position in the batch; kind: key in KINDS; start: position of the document's first token."""
    text = tokenizer.piece(token_id)
    place = f"position {t - start} of its row, {t} of the batch"
    hover = f"{printable(repr(text))}  id {token_id}  {place}  label {label}  {KINDS[kind]}"
    return f'<span class="{kind}" title="{html.escape(hover)}">{visible(text)}</span>'


def visible(text):
    """HTML of a token's text, with visible signs for white space and control characters."""
    hidden = ("Cc", "Cf", "Zs", "Zl", "Zp")  # such as U+202E, which reverses the text after it
    return "".join(
        VISIBLE.get(c) or (f"<i>U+{ord(c):04X}</i>" if unicodedata.category(c) in hidden else html.escape(c))
        for c in text
    )


def name(tokenizer, token_id):
    """A token's text and id, or "none"."""
    return "none" if token_id is None else tokenizer.name_of(token_id)
