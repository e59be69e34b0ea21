"""The plan of a run: rows and learning rate of each step, and the steps that evaluate and save."""

import math

from minitune import data, screen
from minitune.config import TrainConfig


def check_plan(config, plan, test_set):
    """Warn about options that have no effect in a run of this many steps.

    plan: a StepPlan. test_set: the held-out rows, a data.Dataset. Raises ValueError on patience without held-out rows."""
    if config.patience and not test_set.examples:
        raise ValueError("patience needs held-out rows, and there are none; set test_size or test_data")
    total, warmup = plan.total, warmup_steps(plan.total, config)
    if warmup > total:
        screen.warn(
            f"the warm-up takes {warmup:,} steps, but the run has {total:,}: its learning rate ends at "
            f"{config.learning_rate * total / warmup:.3g}, not at {config.learning_rate:g}; lower --warmup"
        )
    standard = TrainConfig(model=config.model).epochs
    if config.max_steps is not None and config.epochs != standard:
        in_epochs = max(1, math.ceil(config.epochs * plan.steps_per_epoch))
        if in_epochs != total:
            screen.warn(
                f"--max-steps {total:,} overrides --epochs {config.epochs:g}, which would be {in_epochs:,} steps; "
                "give one of them"
            )
    evaluations = math.ceil(total / plan.eval_every)
    if config.eval_every is not None and config.eval_every > total and test_set.examples:
        screen.warn(
            f"--eval-every {config.eval_every:,}: the run has {total:,} steps, so only the last step is evaluated"
        )
    if config.save_every is not None and config.save_every > total:
        screen.warn(
            f"--save-every {config.save_every:,}: the run has {total:,} steps, so a state is saved every "
            f"{config.save_minutes:g} minutes (--save-minutes) and at the end"
        )
    if config.patience is not None and config.patience >= evaluations:
        screen.warn(
            f"--patience {config.patience} has no effect: the run has {evaluations} evaluations; lower --eval-every"
        )


class StepPlan:
    """Numbers of steps, and the rows of each step. The rows depend on the seed and the step only, so a resumed run continues
    with the same ones."""

    def __init__(self, config, train_set):
        self.config = config
        self.lengths = [len(example.ids) for example in train_set.examples]
        self.micro_batches = math.ceil(len(self.lengths) / config.batch_size)  # in an epoch
        self.steps_per_epoch = math.ceil(self.micro_batches / config.accumulation)
        self.total = config.max_steps or max(1, math.ceil(config.epochs * self.steps_per_epoch))
        self.eval_every = config.eval_every or max(1, math.ceil(self.total / 10))
        self.save_every = config.save_every or self.eval_every
        self.epoch, self.order = None, None

    def evaluates_after(self, step):
        return step % self.eval_every == 0 or step == self.total

    def saves_after(self, step):
        return step % self.save_every == 0 or step == self.total

    def batches(self, step, train_set, pad_id):
        """The micro-batches of the step that follows `step` completed steps: a list of data.Batch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = data.order(
                self.lengths, self.config.batch_size, self.config.seed, epoch, self.config.group_by_length
            )
        groups = self.order[place * self.config.accumulation : (place + 1) * self.config.accumulation]
        return [data.collate([train_set.examples[i] for i in group], pad_id) for group in groups]


def learning_rate(step, total, config):
    """Learning rate of the step that follows `step` completed steps of `total`.

    Linear warm-up, then constant, or a linear or cosine decay to 0."""
    warmup = warmup_steps(total, config)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * shape[config.schedule]


def warmup_steps(total, config):
    """Steps of the warm-up: config.warmup is a share of `total` if below 1, else the number."""
    return math.ceil(config.warmup * total) if config.warmup < 1 else int(config.warmup)
