"""curves.png: losses and learning rate of a run."""

import io

from minitune.files import write_whole


class Curve:
    """The records that curves.png is drawn from: all of a short run, every n-th of a long one. So neither memory nor drawing
    time grows with the length of the run."""

    LIMIT = 2000  # points of each line

    def __init__(self, records=()):
        self.lines = {"loss": [], "eval_loss": []}
        self.every, self.seen = {"loss": 1, "eval_loss": 1}, {"loss": 0, "eval_loss": 0}
        for record in records:
            self.add(record)

    def add(self, record):
        for key, keys in (("loss", ("step", "loss", "lr")), ("eval_loss", ("step", "eval_loss"))):
            if record.get(key) is None:
                continue
            if self.seen[key] % self.every[key] == 0:
                self.lines[key].append({k: record[k] for k in keys})
            self.seen[key] += 1
            if len(self.lines[key]) > self.LIMIT:
                self.lines[key], self.every[key] = self.lines[key][::2], self.every[key] * 2

    def records(self):
        return [*self.lines["loss"], *self.lines["eval_loss"]]


def draw_curves(records, path):
    """curves.png: training and held-out loss over the steps, the learning rate below."""
    image = io.BytesIO()
    curves(records).savefig(image, format="png", dpi=130)
    write_whole(path, image.getvalue())


def curves(records, figsize=(7, 5)):
    """The figure of curves.png, a matplotlib Figure, from the records of metrics.jsonl. figsize: in inches."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no state between figures
    from matplotlib.ticker import MaxNLocator

    train = [(r["step"], r["loss"], r["lr"]) for r in records if "loss" in r]
    held_out = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    figure = Figure(figsize=figsize, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    if train:
        steps, losses, rates = zip(*train, strict=True)
        smooth, average = [], losses[0]
        for loss in losses:
            average += (loss - average) * min(1.0, 2 / (1 + 0.05 * len(losses) + 1))
            smooth.append(average)
        top.plot(steps, losses, color="#9db8d9", linewidth=0.8)
        top.plot(steps, smooth, color="#1f5fa8", linewidth=1.8, label="training (smoothed)")
        bottom.plot(steps, rates, color="#555555", linewidth=1.2)
    if held_out:
        top.plot(
            *zip(*held_out, strict=True), color="#c8501e", marker="o", markersize=4, linewidth=1.5, label="held-out"
        )
    if train or held_out:
        top.legend(frameon=False)
    top.set_ylabel("loss per supervised token (nats)")
    bottom.set_ylabel("learning rate")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.set_xlabel("optimizer step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure
