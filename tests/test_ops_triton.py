"""The operations in Triton against their formulas, the formulas against what the models compute in PyTorch, and both
against torch's own autograd. Without a GPU the kernels run in Triton's interpreter and are built, but not run, for CUDA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from minitune_kernels import formulas, ops, ops_torch
from torch.utils._python_dispatch import TorchDispatchMode

from minitune.models import layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
TESTS = Path(__file__).parent

pytest.importorskip("triton", reason="tests Triton kernels: pip install triton")
from minitune_kernels import ops_triton  # noqa: E402 - triton is there


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """The module of the kernels. Where the door would take the reference, nothing below would test them."""
    if DEVICE == "cpu":
        import triton_interpreter

        triton_interpreter.install()
    assert ops.why_no_triton(torch.device(DEVICE)) is None
    return ops_triton


@pytest.fixture
def random():
    """random(*shape, dtype=..) -> normal values that ask for a gradient, the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype).requires_grad_()

    return draw


def run(operation, inputs, grad):
    """[output, gradient of each input] of operation(*inputs), given the gradient of the output."""
    out = operation(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def check_close(actual, expected, steps):
    """Differences of at most `steps` units of the dtype's precision at the largest value of a tensor. In fp32 8 of them are
    1e-6: sums run in another order. In 16 bits both sides round alike, and fp32's last bit moves a value across the border
    of a rounding now and then: one step for each rounding on the way."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        if e.numel():
            step = e.double().abs().max() * torch.finfo(e.dtype).eps
            assert (a.double() - e.double()).abs().max() <= steps * step


def cross_entropy_by_torch_(logits, targets):
    """The summed loss; the logits become their gradient."""
    loss, gradient = ops_torch.loss_and_gradient(logits, targets)
    logits.copy_(gradient)
    return loss


def tables(B, T, half, dtype):
    angles = torch.arange(B * T, device=DEVICE).view(B, 1, T, 1) * torch.linspace(1, 0.01, half, device=DEVICE)
    return angles.cos().to(dtype), angles.sin().to(dtype)


# RMSNorm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 100), (5, 2), (0, 16), (1, 8192), (1, 33)])
def test_rms_norm_and_its_gradients_are_those_of_the_reference_and_of_the_model(random, shape, dtype, monkeypatch):
    monkeypatch.setattr(ops_triton, "BACKWARD_PROGRAMS", 4)  # fewer than the rows of some shapes
    x, weight, grad = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype), random(*shape, dtype=dtype)
    ours, reference, model = (
        run(operation, (x, weight), grad)
        for operation in (
            lambda x, weight: ops_triton.rms_norm(x, weight, EPS),
            lambda x, weight: formulas.rms_norm(x, weight, EPS),
            lambda x, weight: ops_torch.rms_norm(x, weight, EPS),
        )
    )
    steps = 8 if dtype == torch.float32 else 2
    check_close(ours, model, steps)
    check_close(reference[:2], model[:2], steps)
    # torch's own graph rounds each product of the sum over rows, which the kernel and the model keep in fp32
    check_close(reference[2:], model[2:], steps + max(x.numel() // shape[-1], 1) ** 0.5)


def test_rms_norm_of_16_bit_values_with_an_fp32_weight_gives_fp32(random):
    x, weight, grad = random(3, 100, dtype=torch.bfloat16), random(100), random(3, 100)
    ours = run(lambda x, weight: ops_triton.rms_norm(x, weight, EPS), (x, weight), grad)
    model = run(lambda x, weight: ops_torch.rms_norm(x, weight, EPS), (x, weight), grad)
    assert [t.dtype for t in ours] == [torch.float32, torch.bfloat16, torch.float32]
    check_close(ours[:1] + ours[2:], model[:1] + model[2:], 8)
    check_close(ours[1:2], model[1:2], 2)


def test_rms_norm_gives_a_frozen_weight_no_gradient(random):
    x, weight, grad = random(3, 100), random(100), random(3, 100)
    (expected,) = torch.autograd.grad(ops_triton.rms_norm(x, weight, EPS), x, grad)
    out = ops_triton.rms_norm(x, weight.detach(), EPS)
    out.backward(grad)
    assert torch.equal(x.grad, expected)


# SwiGLU


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 1100), (1,), (0, 5), (7, 11)])
def test_swiglu_and_its_gradients_are_those_of_the_reference_and_of_the_model(random, shape, dtype):
    gate, up, grad = random(*shape, dtype=dtype, scale=4), random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    ours, reference, model = (
        run(operation, (gate, up), grad) for operation in (ops_triton.swiglu, formulas.swiglu, ops_torch.swiglu)
    )
    steps = 8 if dtype == torch.float32 else 2
    check_close(ours, reference, steps)
    check_close(reference, model, steps)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_holds_at_the_ends_of_the_range(dtype):
    top = torch.finfo(dtype).max
    gate = torch.tensor([-top, -100.0, -20.0, 0.0, 20.0, 100.0, top], device=DEVICE).to(dtype).requires_grad_()
    up, grad = torch.ones_like(gate, requires_grad=True), torch.ones_like(gate)
    ours, reference = (run(operation, (gate, up), grad) for operation in (ops_triton.swiglu, formulas.swiglu))
    for a, e in zip(ours, reference, strict=True):
        assert torch.allclose(a, e, rtol=8 * torch.finfo(dtype).eps, atol=1e-7)


# RoPE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tables_B", [1, 2], ids=["shared tables", "tables of each row"])
@pytest.mark.parametrize("H, D", [(3, 20), (40, 128), (1, 2), (71, 64)])
def test_rope_and_its_gradient_are_those_of_the_reference_and_of_the_model(random, H, D, tables_B, dtype):
    x, grad = random(2, 3, H * D, dtype=dtype), random(2, H, 3, D, dtype=dtype)
    cos, sin = tables(tables_B, 3, D // 2, dtype)
    ours, reference, model = (
        run(lambda x: operation(x.view(2, 3, H, D).transpose(1, 2), cos, sin), (x,), grad)  # noqa: B023
        for operation in (ops_triton.rope, formulas.rope, ops_torch.rope)
    )
    assert all(map(torch.equal, ours, reference))
    assert all(map(torch.equal, reference, model))


def test_rope_turns_back_what_it_turned(random):
    x, (cos, sin) = random(2, 3, 4, 20), tables(2, 4, 10, torch.float32)
    assert torch.allclose(ops_triton.rope(ops_triton.rope(x, cos, sin), cos, -sin), x, atol=1e-6)


def test_rope_reads_a_part_of_a_projection_without_a_copy_and_writes_the_layout_of_one(random):
    class Copies(TorchDispatchMode):
        seen = []

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.seen += [operation] if operation in (torch.ops.aten.clone.default, torch.ops.aten.cat.default) else []
            return operation(*args, **(kwargs or {}))

    heads = random(2, 5, 3 * 32).view(2, 5, 3, 32).transpose(1, 2)  # (B, H, T, D)
    part = heads[..., :12]  # a partial rotary, as Phi has
    cos, sin = tables(1, 5, 6, torch.float32)
    with Copies() as copies:
        out = ops_triton.rope(part, cos, sin)
    assert not copies.seen and out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, formulas.rope(part, cos, sin))


def test_rope_of_packed_documents_is_rope_of_each(random):
    rope, lengths = layers.Rope(head_dim=8, theta=10000.0), [3, 1, 4]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(DEVICE)
    x = random(1, 2, 8, 8)
    out = ops_triton.rope(x, *rope.tables(positions, x.dtype, lengths))
    alone = [ops_triton.rope(part, *rope.tables(torch.arange(part.shape[2], device=DEVICE)[None], x.dtype))
             for part in x.split(lengths, dim=2)]  # fmt: skip
    assert torch.equal(out, torch.cat(alone, dim=2))


# Strides and roundings


def test_rows_and_gradients_at_any_strides_give_the_same_values(random):
    wide, weight = random(4, 6, 50), random(25)
    grads = random(1).expand(4, 3, 25), random(4, 3, 50)[..., 25:], random(25, 3, 4).transpose(0, 2)
    for x in (wide[:, ::2, :25], wide[:, 3:, 25:], wide[:, :3, ::2], wide.transpose(0, 2)[:25, :3].transpose(0, 2)):
        dense = x.contiguous()
        for operation in (lambda x: ops_triton.rms_norm(x, weight, EPS), lambda x: ops_triton.swiglu(x, 2 * x)):
            assert torch.equal(operation(x), operation(dense))
            for grad in grads:
                (ours,) = torch.autograd.grad(operation(x), wide, grad)
                (expected,) = torch.autograd.grad(operation(dense), wide, grad.contiguous())
                assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_16_bit_values_are_rounded_where_the_model_rounds(random, dtype):
    x, up, weight, grad = (random(*shape, dtype=dtype) for shape in ((4, 500), (4, 500), (500,), (4, 500)))
    for ours, model, inputs in [
        (lambda x: ops_triton.rms_norm(x, weight, EPS), lambda x: ops_torch.rms_norm(x, weight, EPS), (x,)),
        (ops_triton.swiglu, ops_torch.swiglu, (x, up)),
    ]:
        for a, e in zip(run(ours, inputs, grad), run(model, inputs, grad), strict=True):
            # a last bit of fp32 changes one rounding in thousands; a missing rounding changes every fourth value or more
            assert (a != e).float().mean() < 0.01


# Cross-entropy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, V", [(3, 32000), (2, 51200), (2, 128256), (2, 50257), (9, 33), (2, 1), (0, 40)])
def test_cross_entropy_and_its_gradient_are_those_of_the_reference_and_of_fp64(random, N, V, dtype):
    logits, targets = random(N, V, dtype=dtype, scale=4), torch.arange(N, device=DEVICE) * 31 % V
    targets[-1:] = V - 1
    exact_loss = F.cross_entropy(logits.double(), targets, reduction="sum")
    (exact,) = torch.autograd.grad(exact_loss, logits)
    ours, reference = logits.detach().clone(), logits.detach().clone()
    check_close([ops_triton.cross_entropy_(ours, targets)], [exact_loss.detach().float()], 8)
    of_sum = V**0.5 * torch.finfo(torch.float32).eps
    loss = cross_entropy_by_torch_(reference, targets)
    assert (loss - exact_loss).abs() <= 1e-6 * exact_loss.abs() + N * of_sum
    # Every gradient at its own size: the difference inside exp, up to 40, is rounded by 2e-6, and a GPU's exp rounds its product
    # with log2(e) again. The reference has torch's sum of V values in fp32, which adds as many at once as the CPU's vectors hold:
    # its V roundings add up to about the root of V. 16 bits: one rounding, which may fall to the other side.
    for gradient, rtol in ((ours, 8e-6), (reference, 8e-6 + of_sum)):
        rtol = max(rtol, torch.finfo(dtype).eps)
        atol = 6e-8 if dtype == torch.float16 else 0  # its step below 6e-5
        assert torch.allclose(gradient.float(), exact.float(), rtol=rtol, atol=atol)


def test_a_row_that_does_not_count_has_no_loss_and_no_gradient(random):
    logits, targets = random(3, 50).detach(), torch.tensor([7, -100, 0], device=DEVICE)
    counted, expected = logits.clone(), logits[::2].clone()
    loss = ops_triton.cross_entropy_(counted, targets)
    assert torch.equal(loss, ops_triton.cross_entropy_(expected, targets[::2].contiguous()))
    assert torch.equal(counted[::2], expected) and not counted[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_holds_where_exp_would_overflow_and_where_logits_are_masked(dtype):
    logits = torch.zeros(3, 20000)
    logits[0, :9000] = -float("inf")  # the whole first chunk
    logits[0, 9000:] = torch.linspace(-50, 50, 11000)
    logits[1] = 30000.0
    logits[2, 11] = 60000.0
    logits, targets = logits.to(DEVICE, dtype), torch.tensor([19999, 5, 11], device=DEVICE)
    expected = logits.clone()
    check_close([ops_triton.cross_entropy_(logits, targets)], [cross_entropy_by_torch_(expected, targets)], 8)
    assert torch.allclose(logits.float(), expected.float(), rtol=0, atol=torch.finfo(dtype).eps)
    assert logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("poison", ["a NaN", "an infinity", "nothing but -infinity"])
def test_what_has_no_loss_gives_nan(random, poison):
    logits = random(1, 50).detach()
    logits[0] = logits[0] if poison != "nothing but -infinity" else -float("inf")
    logits[0, 9] = {"a NaN": float("nan"), "an infinity": float("inf")}.get(poison, -float("inf"))
    expected, targets = logits.clone(), torch.tensor([3], device=DEVICE)
    loss, expected_loss = ops_triton.cross_entropy_(logits, targets), cross_entropy_by_torch_(expected, targets)
    assert loss.isnan() and expected_loss.isnan() and logits[0, 9].isnan() and expected[0, 9].isnan()


@pytest.mark.parametrize("target", [50, -1, 2**40])
def test_a_target_outside_the_vocabulary_gives_nan_and_reads_nothing(random, target):
    assert ops_triton.cross_entropy_(random(1, 50).detach(), torch.tensor([target], device=DEVICE)).isnan()


def with_cross_entropy_(head, hidden, targets):
    """The loss of the head and the gradients of hidden and of the head's parameters, the way a model uses it."""
    logits = head(hidden)
    gradient = logits.detach()
    loss = ops_triton.cross_entropy_(gradient, targets)
    return [loss, *torch.autograd.grad(logits, [hidden, *head.parameters()], gradient)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_gives_the_loss_and_gradients_of_the_models_loss(random, dtype):
    head = torch.nn.Linear(24, 101).to(DEVICE, dtype)
    hidden, targets = random(10, 24, dtype=dtype), torch.arange(10, device=DEVICE) * 11
    loss = ops.cross_entropy(hidden, head, targets)
    expected = [loss.detach(), *torch.autograd.grad(loss, [hidden, *head.parameters()])]
    check_close(with_cross_entropy_(head, hidden, targets), expected, 8 if dtype == torch.float32 else 2)


def test_a_head_that_still_needs_its_logits_is_told_that_they_are_gone(random):
    head = torch.nn.Sequential(torch.nn.Linear(24, 101), torch.nn.Tanh()).to(DEVICE)  # tanh keeps its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        with_cross_entropy_(head, random(4, 24), torch.arange(4, device=DEVICE))


# Against torch's own operations in fp64, and the door


def rope_by_complex_numbers(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    turned = torch.complex(low, high) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag), dim=-1)


def test_values_and_gradients_are_those_of_torch_autograd_in_fp64(random):
    x, weight, up = random(2, 3, 5, 12), random(12), random(2, 3, 5, 12)
    cos, sin = tables(2, 5, 6, torch.float32)
    for ours, exact, inputs in [
        (lambda x, w: ops_triton.rms_norm(x, w, EPS), lambda x, w: F.rms_norm(x, (12,), w, EPS), (x, weight)),
        (ops_triton.swiglu, lambda gate, up: gate * gate.sigmoid() * up, (x, up)),
        (
            lambda x: ops_triton.rope(x, cos, sin),
            lambda x: rope_by_complex_numbers(x, cos.double(), sin.double()),
            (x,),
        ),
    ]:
        grad = random(2, 3, 5, 12)
        wide = [t.detach().double().requires_grad_() for t in inputs]
        expected = [t.float() for t in run(exact, wide, grad.double())]
        check_close(run(ours, inputs, grad), expected, 8)
    logits, targets = random(4, 77), torch.arange(4, device=DEVICE)
    loss = F.cross_entropy(logits.double(), targets, reduction="sum")
    (expected,) = torch.autograd.grad(loss, logits)
    gradient = logits.detach().clone()
    check_close([ops_triton.cross_entropy_(gradient, targets), gradient], [loss.detach().float(), expected], 8)


def test_only_cross_entropy_writes_into_what_it_is_given(random):
    x, weight, grad = random(2, 3, 4, 12), random(12), random(2, 3, 4, 12)
    given = [x, weight, grad, *tables(2, 4, 6, torch.float32)]
    before = [t.detach().clone() for t in given]
    run(lambda x, weight: ops_triton.rms_norm(x, weight, EPS), (x, weight), grad)
    run(ops_triton.swiglu, (x, x), grad)
    run(lambda x: ops_triton.rope(x, *given[3:]), (x,), grad)
    assert all(map(torch.equal, given, before))


@pytest.fixture
def asked_for(monkeypatch):
    """MINITUNE_KERNELS=triton, which lets the door take these kernels."""
    monkeypatch.setenv("MINITUNE_KERNELS", "triton")


def test_the_door_takes_the_kernels_only_where_they_are_asked_for_and_fit(random, kernels, asked_for, monkeypatch):
    taken = []
    for name in ("rms_norm", "swiglu", "rope", "loss_and_gradient"):
        own = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, name=name, own=own: taken.append(name) or own(*args))
    x, (cos, sin), head = random(1, 2, 3, 12), tables(1, 3, 6, torch.float32), torch.nn.Linear(12, 7).to(DEVICE)
    targets = torch.zeros(3, dtype=torch.int64, device=DEVICE)

    def through_the_door():
        ops.rms_norm(x, x[0, 0, 0], EPS)
        ops.swiglu(x, x)
        ops.rope(x, cos, sin)
        ops.cross_entropy(x[0, 0], head, targets)

    through_the_door()  # the first time they are compared, too
    taken.clear()
    through_the_door()
    assert taken == ["rms_norm", "swiglu", "rope", "loss_and_gradient"]
    ops.rms_norm(random(1, 9000), random(9000), EPS)  # longer than a program's row
    ops.rope(x, cos[..., :4], sin[..., :4])  # a part of a head
    ops.swiglu(x.double(), x.double())
    monkeypatch.delenv("MINITUNE_KERNELS")
    through_the_door()
    assert len(taken) == 4


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.rms_norm(torch.ones(2, 8), torch.ones(7), EPS),
        lambda: ops.swiglu(torch.ones(2, 8), torch.ones(7)),
        lambda: ops.rope(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_left_to_torch(call, asked_for):
    with pytest.raises(RuntimeError, match="size|shape"):
        call()


@pytest.fixture
def forget():
    ops.why_no_triton.cache_clear()
    yield
    ops.why_no_triton.cache_clear()


def test_where_triton_does_not_run_the_door_says_why_and_takes_torch(random, forget, kernels, asked_for, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert ops.why_no_triton(torch.device("cuda")) == "compute capability 7.5 is below 8.0"
    assert "meta" in ops.why_no_triton(torch.device("meta"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in ops.why_no_triton(torch.device("cpu"))
    monkeypatch.delattr(kernels, "swiglu")
    gate, up = random(2, 8), random(2, 8)
    if DEVICE == "cpu":
        assert torch.equal(ops.swiglu(gate, up), formulas.swiglu(gate, up))
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    ops.why_no_triton.cache_clear()
    assert ops.why_no_triton(torch.device("cuda")) == "triton is not installed"
    assert torch.equal(ops.swiglu(gate, up), formulas.swiglu(gate, up))


# Builds


# Compute capability -> dtypes that are built for it, as in test_nf4_triton.py.
BUILDS = {80: (torch.float32, torch.bfloat16), 89: (torch.float16,), 90: (torch.bfloat16,)}


def launches(kernels, dtypes):
    """[(kernel, arguments by name, options)] of every kernel at the shapes of real layers. Tensors are on the meta device."""
    from triton.runtime.jit import JITFunction

    seen = []

    def record(self, *args, grid, warmup, **named):
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments |= {name: named.pop(name) for name in self.arg_names if name in named}
        seen.append((self, arguments, named))

    JITFunction.run = record  # this process builds and never launches

    for dtype in dtypes:

        def meta(*shape, dtype=dtype, asks=True):
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=asks)

        for weight in (meta(8192), meta(8192, asks=False)):
            kernels.RMSNorm.apply(meta(2048, 8192), weight, EPS).sum().backward()
        kernels.SwiGLU.apply(meta(2048, 11008), meta(2048, 11008)).sum().backward()
        table = meta(1, 1, 2048, 64, asks=False)
        kernels.RoPE.apply(meta(1, 2048, 32, 128).transpose(1, 2), table, table).sum().backward()
        kernels.RoPE.apply(meta(1, 71, 3, 20), *[meta(1, 1, 3, 10, asks=False)] * 2)
        for V in (128256, 50257):
            kernels.cross_entropy_(meta(128, V, asks=False), meta(128, dtype=torch.int64, asks=False))
    missing = {k.__name__ for k in vars(kernels).values() if isinstance(k, JITFunction)} - {
        k.__name__ for k, _, _ in seen
    }
    assert not missing, f"not launched: {missing}"
    return seen


def build(kernel, arguments, options, capability):
    """The cubin that a launch with these arguments would build for sm_`capability`, specialised as Triton does."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            kind = pointers[value.dtype]
        elif parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            kind, constants[parameter.name] = "constexpr", value
        else:
            kind = "fp32" if isinstance(value, float) else "i32"
        signature[parameter.name] = kind
        if kind[0] == "*" or kind == "i32" and value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


def report_builds(folder):
    """Prints {"kernel dtype capability": ["STACK:0", "LOCAL:0"]}, the bytes a thread that did not fit in registers, as JSON."""
    from minitune_kernels import ops_triton
    from triton import knobs

    report, path = {}, Path(folder, "kernel.cubin")
    for capability, dtypes in BUILDS.items():
        for kernel, arguments, options in launches(ops_triton, dtypes):
            path.write_bytes(build(kernel, arguments, options, capability))
            command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            dtype = next(iter(arguments.values())).dtype
            name = f"{kernel.__name__} {dtype} sm_{capability}"
            report.setdefault(name, []).extend(word for word in usage if word.startswith(("STACK:", "LOCAL:")))
    print(json.dumps(report))


def test_every_kernel_builds_for_cuda_without_spills(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-c", f"import test_ops_triton; test_ops_triton.report_builds({str(tmp_path)!r})"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert len(report) == 6 * sum(map(len, BUILDS.values()))
    assert {name: usage for name, usage in report.items() if not set(usage) == {"STACK:0", "LOCAL:0"}} == {}
