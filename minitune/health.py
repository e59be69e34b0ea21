"""Checks of a training step and of the adapter's weights. A failed check returns or raises a description of the problem."""

import math
import statistics

import torch

from minitune.adapters import lora


def check_gradients(trained):
    """Raises RuntimeError if a trained tensor has no gradient. Called after the first backward pass, because checkpointing or
    a detached layer can cut off gradients without an error. trained: {name: parameter}."""
    if lost := [name for name, p in trained.items() if p.grad is None]:
        raise RuntimeError(
            f"{len(lost)} trained tensors got no gradient, such as {lost[0]}; this is a bug in the model's wiring"
        )


def broken(loss, grad_norm, recent, spike_factor, scaler):
    """Why a step must not be taken, as text, or None.

    recent: losses of the last 16 steps. scaler: the GradScaler; if it is enabled, an infinite gradient is normal, since the
    scaler then skips the step and lowers its scale."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm) and not (scaler.is_enabled() and scaler.get_scale() > 1):
        return f"the loss is {loss:.4f} but the gradient norm is {grad_norm}"
    if spike_factor and len(recent) == 16:
        # The losses of small batches vary, so a spike must also exceed the spread of the last steps.
        usual, spread = statistics.median(recent), statistics.stdev(recent)
        if loss > spike_factor * usual and loss > usual + max(2, 6 * spread):
            return (
                f"the loss jumped to {loss:.4f}; the median of the 16 steps before is {usual:.4f} (--spike-factor 0 turns "
                "this check off)"
            )
    return None


class AdapterSize:
    """The size of an adapter, from the norms of its tensors. It shows weights that are finite but far too large, as after
    steps with a huge learning rate.

    trained: {name: parameter} of the model's adapter."""

    LARGEST = 1e4  # mean change of a weight; a model's own weights are near 0.02, and adapters change them by less

    def __init__(self, model, trained):
        self.tensors, place = [p.detach() for p in trained.values()], {name: i for i, name in enumerate(trained)}
        self.pairs = [
            (
                name,
                place[f"{name}.lora_A.weight"],
                place[f"{name}.lora_B.weight"],
                layer.scaling / math.sqrt(layer.lora_A.weight.shape[1] * layer.lora_B.weight.shape[0]),
            )
            for name, layer in lora.lora_layers(model).items()
        ]
        self.start = math.hypot(*self.norms())

    def norms(self):
        """The norm of each trained tensor, as a list of floats."""
        return torch.stack(torch._foreach_norm(self.tensors)).tolist()

    def growth(self):
        """Norm of all tensors, divided by their norm at the start."""
        return math.hypot(*self.norms()) / self.start

    def blown_up(self):
        """If the adapter has become too large to work: what happened, as the end of a sentence. Else None."""
        norms = self.norms()
        changes = {name: norms[a] * norms[b] * scale for name, a, b, scale in self.pairs}
        # `not <=` also finds NaN.
        name = next((name for name, change in changes.items() if not change <= self.LARGEST), None)
        if name is None:
            return None
        return (
            f"made the adapter too large: it changes each weight of {name} by about {changes[name]:.0e}, while a model's own "
            "weights are near 0.02"
        )


def does_not_move(loss, progress, size):
    """Whether training has no effect on the loss any more: the last five losses are equal and about as high as the first,
    although the adapter has grown to over twice its initial norm.

    progress: a runs.state.Progress. size: an AdapterSize. A tiny learning rate, skipped steps and rows that are already learnt
    do not count."""
    recent = [*progress.recent_losses[-4:], loss]
    is_flat = len(recent) == 5 and max(recent) - min(recent) <= 1e-6 * max(recent)
    return is_flat and min(recent) > max(1e-3, 0.9 * progress.first_loss) and size.growth() > 2
