"""Faster PyTorch for the formulas: torch's fused functions, and gradients by hand that keep less memory than autograd would.

Each function has the name and the arguments of its formula in formulas.py, and is used while it agrees with it (agreement.py)."""

import torch
import torch.nn.functional as F

CHUNK = 128  # tokens whose logits are in memory at once


class RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row for the backward pass; autograd would keep two fp32 copies of x."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            inner = (grad * weight).float()
            along = (inner * normed).mean(-1, keepdim=True)
            grad_x = inner.sub_(normed.mul_(along)).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


rms_norm = RMSNorm.apply


class SwiGLU(torch.autograd.Function):
    """Keeps gate and up, and computes silu(gate) again."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


swiglu = SwiGLU.apply


class RoPE(torch.autograd.Function):
    """Keeps the tables alone: the gradient of x is the gradient of the output, rotated back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return rotated(grad, cos, -sin), None, None


rope = RoPE.apply


def rotated(x, cos, sin):
    """formulas.rope, each part written where it belongs."""
    half, rest = cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]
    low, high, still = x.split((half, half, rest), dim=-1)
    out = torch.empty_like(x)
    out_low, out_high, out_still = out.split((half, half, rest), dim=-1)
    torch.mul(low, cos, out=out_low).sub_(high * sin)
    torch.mul(high, cos, out=out_high).add_(low * sin)
    out_still.copy_(still)
    return out


class CrossEntropy(torch.autograd.Function):
    """The sum of formulas.cross_entropy. The gradient of each chunk is computed at once in the forward pass, so that neither all
    logits nor a recomputation remain; the idea is Liger-Kernel's (arXiv 2410.10989)."""

    @staticmethod
    def forward(ctx, hidden, head, targets, loss_and_gradient, *trained):
        """loss_and_gradient(logits (n, V), targets (n,)) -> (summed loss () fp32, gradient of the logits in their dtype)."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grads = [torch.zeros_like(p) for p in trained]
        grad_hidden = torch.empty_like(hidden)
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            with torch.enable_grad():
                h = hidden[part].detach().requires_grad_()
                logits = head(h)
            loss, grad_logits = loss_and_gradient(logits.detach(), targets[part])
            total += loss
            with torch.enable_grad():
                start_of_backward = GradientOf.apply(logits, grad_logits)
            grad_h, *grad_trained = torch.autograd.grad(start_of_backward, [h, *trained])
            grad_hidden[part] = grad_h
            for total_grad, grad in zip(grads, grad_trained, strict=True):
                total_grad += grad
        ctx.save_for_backward(grad_hidden, *grads)
        return total

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, *grads = (grad_loss.to(g.dtype) * g for g in ctx.saved_tensors)
        return grad_hidden, None, None, None, *grads


class GradientOf(torch.autograd.Function):
    """A number whose gradient with respect to y is `grad`. torch.autograd.grad with a gradient as an argument does the same, and
    imports sympy for it, which takes 0.7 s."""

    @staticmethod
    def forward(ctx, y, grad):
        ctx.grad = grad
        return y.new_zeros(())

    @staticmethod
    def backward(ctx, grad_number):
        return ctx.grad, None


def loss_and_gradient(logits, targets):
    """See CrossEntropy: softmax minus one at the target, written into one fp32 tensor."""
    scores = logits.log_softmax(-1, dtype=torch.float32)
    column = targets[:, None]
    loss = -scores.gather(1, column).sum()
    scores.exp_().scatter_add_(1, column, scores.new_full(column.shape, -1.0))
    return loss, scores.to(logits.dtype)


def trained_parameters(head):
    return [p for p in head.parameters() if p.requires_grad]


def cross_entropy_with_gradient(hidden, head, targets, loss_and_gradient=loss_and_gradient):
    """The sum of formulas.cross_entropy, with its gradient."""
    return CrossEntropy.apply(hidden, head, targets, loss_and_gradient, *trained_parameters(head))


def cross_entropy(hidden, head, targets, reduction="none"):
    """formulas.cross_entropy without a gradient: a list of (n,) for each chunk, or of their sums."""
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return [F.cross_entropy(head(h).float(), t, reduction=reduction) for h, t in parts]


def layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, weight.shape, weight, bias, eps)


gelu = F.gelu
linear = F.linear


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def lora_(y, x, A, B, scaling):
    """formulas.lora, added to y in place, so that there is no second (rows, out). y (rows, out); x (rows, in)."""
    low = F.linear(x, A.to(x.dtype))  # (rows, r)
    return y.addmm_(low.to(y.dtype), (B * scaling).to(x.dtype).T.to(y.dtype))


def attention(q, k, v, mask=None, is_causal=False):
    """torch's scaled_dot_product_attention."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)


def attention_over_cache(q, stores, new_mask, prompt_mask):
    """See ops.attention_over_cache: q (R, H, T, D) attends over stored keys. Scores and sums in fp32; a prompt's keys are read
    once for all its sequences, and the softmax runs over prompt and new keys together."""
    prompt_k, prompt_v, new_k, new_v = stores
    (R, H, T, D), (B, H_kv, P, _), S = q.shape, prompt_k.shape, new_k.shape[2]
    n, G = R // B, H // H_kv
    dtype, new_k, new_v = q.dtype, new_k.float(), new_v.float()
    q = q.float().mul_(D**-0.5) if q.dtype != torch.float32 else q * D**-0.5
    q = q.reshape(B, n, H_kv, G * T, D)
    over_prompt = q.transpose(1, 2).reshape(B, H_kv, n * G * T, D) @ prompt_k.float().mT
    over_prompt = over_prompt.view(B, H_kv, n, G, T, P)
    if prompt_mask is not None:
        over_prompt = over_prompt.masked_fill(~prompt_mask, -torch.inf)
    over_new = (q.reshape(R, H_kv, G * T, D) @ new_k.mT).view(R, H_kv, G, T, S).masked_fill(~new_mask, -torch.inf)
    scores = torch.cat([over_prompt.transpose(1, 2).reshape(R, H_kv, G, T, P), over_new], dim=-1).softmax(-1)
    from_prompt = scores[..., :P].reshape(B, n, H_kv, G * T, P).transpose(1, 2).reshape(B, H_kv, n * G * T, P)
    from_prompt = (from_prompt @ prompt_v.float()).view(B, H_kv, n, G * T, D).transpose(1, 2)
    from_new = scores[..., P:].reshape(R, H_kv, G * T, S) @ new_v
    return (from_prompt.reshape(R, H, T, D) + from_new.view(R, H, T, D)).to(dtype)


def most_likely(logits, count):
    """Of equal tokens any may be first."""
    return logits.float().log_softmax(-1).topk(count)
