"""The loss of a micro-batch and of the held-out rows: cross-entropy, summed over the supervised tokens."""

import math

import torch
from minitune_kernels import ops

from minitune import data


def batch_loss(model, batch):
    """Cross-entropy in nats, summed over the supervised tokens of a data.Batch: a scalar tensor.

    Logits are computed only at positions whose next token is supervised."""
    device = model.model.embed_tokens.weight.device  # the head may be a LoRALinear
    hidden = model.model(batch.input_ids.to(device), documents=batch.documents)[0]  # (N, C)
    positions, next_tokens = (t.to(device) for t in batch.targets())
    return ops.cross_entropy(hidden[positions], model.lm_head, next_tokens)


@torch.no_grad()
def held_out_loss(model, examples, batch_size, pad_id):
    """Cross-entropy in nats per supervised token, over all examples. Every token has the same weight.

    examples: a list of data.Example. batch_size: examples in a call of the model. pad_id: token id for padding. Raises
    FloatingPointError if a loss is not finite."""
    model.eval()
    by_length = sorted(examples, key=lambda example: len(example.ids))
    batches = [data.collate(by_length[i : i + batch_size], pad_id) for i in range(0, len(by_length), batch_size)]
    losses = [batch_loss(model, batch).item() for batch in batches]
    if bad := [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]:
        where = first_nonfinite(model, bad[:1])
        raise FloatingPointError(
            f"the held-out loss is not finite{f', first in the output of {where}' if where else ''}. Its rows (counted "
            f"from 0 in the file): {', '.join(map(str, bad[0].rows))}. Check the model's weights, or use --dtype fp32"
        )
    return math.fsum(losses) / sum(batch.supervised for batch in batches)


@torch.no_grad()
def first_nonfinite(model, batches):
    """Name of the first module whose output is not finite when the model runs on `batches`, or None."""
    found = []

    def look(name):
        def hook(module, args, output):
            if not found and isinstance(output, torch.Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        for batch in batches:
            batch_loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
