"""Whether a step may be taken and an adapter is sound: checks of numbers, in words where they fail."""

import math
import statistics

import torch

from minitune.adapters import lora


def check_gradients(trained):
    """After the first backward pass: checkpointing or a detached layer can cut gradients off without a word."""
    if lost := [name for name, p in trained.items() if p.grad is None]:
        raise RuntimeError(
            f"{len(lost)} trained tensors got no gradient, such as {lost[0]}; this is a bug in the model's wiring"
        )


def broken(loss, grad_norm, recent, spike_factor, scaler):
    """Why a step must not be taken, or None. With a scaler an infinite gradient is normal: it skips the step and
    lowers its scale."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm) and not (scaler.is_enabled() and scaler.get_scale() > 1):
        return f"the loss is {loss:.4f} but the gradient norm is {grad_norm}"
    if spike_factor and len(recent) == 16:
        usual, spread = statistics.median(recent), statistics.stdev(recent)  # small batches scatter: that is no spike
        if loss > spike_factor * usual and loss > usual + max(2, 6 * spread):
            return f"the loss jumped to {loss:.4f}; the median of the 16 steps before is {usual:.4f} (--spike-factor 0 goes on)"
    return None


class AdapterSize:
    """How large an adapter has become, from the norms of its tensors: numbers that a huge learning rate leaves finite, but
    that no model works with."""

    LARGEST = 1e4  # mean change of one weight; a model's weights are near 0.02, and adapters change them by less

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
        return torch.stack(torch._foreach_norm(self.tensors)).tolist()

    def growth(self):
        """The norm of all tensors, over that of the start."""
        return math.hypot(*self.norms()) / self.start

    def blown_up(self):
        """What happened to an adapter that cannot work any more, in words; None for a sound one."""
        norms = self.norms()
        changes = {name: norms[a] * norms[b] * scale for name, a, b, scale in self.pairs}
        name = next((name for name, change in changes.items() if not change <= self.LARGEST), None)  # nan is not either
        if name is None:
            return None
        return (
            f"blew the adapter up: it changes the weights of {name} by about {changes[name]:.0e} each, while a model's own "
            "are near 0.02"
        )


def does_not_move(loss, progress, size):
    """Whether a model is dead: five losses in a row are equal and as high as at the start, although the adapter has
    grown. A tiny rate, a skipped step or rows that are learnt make no dead model."""
    recent = [*progress.recent_losses[-4:], loss]
    is_flat = len(recent) == 5 and max(recent) - min(recent) <= 1e-6 * max(recent)
    return is_flat and min(recent) > max(1e-3, 0.9 * progress.first_loss) and size.growth() > 2
