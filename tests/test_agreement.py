"""The check behind the doors: what differs from its formula is set aside and said once, and the check itself leaves no trace."""

from pathlib import Path

import pytest
import torch
from minitune_kernels import agreement, built, formulas, nf4, nf4_cpu, nf4_reference, ops, ops_cpu, ops_torch, replay
from torch.overrides import TorchFunctionMode

needs_c = pytest.mark.skipif(not ops_cpu.runs_here(None), reason="there is no C compiler")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Start as a new process does, with nothing compared yet, and forget afterwards what these tests found."""
    monkeypatch.delenv("MINITUNE_KERNELS", raising=False)
    for name, empty in (("_verdicts", {}), ("_aside", set()), ("_said", set())):
        monkeypatch.setattr(agreement, name, empty)
    built.tell.cache_clear()


def louder(x, weight, eps, rms_norm=formulas.rms_norm):
    return rms_norm(x, weight, eps) * 1.01


X, WEIGHT = torch.linspace(-1, 1, 24).view(2, 12), torch.linspace(0.5, 1, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_gradient", [False, True])
def test_a_formula_that_changes_in_a_running_process_is_followed_and_so_is_its_return(
    dtype, has_gradient, monkeypatch, capsys
):
    x, weight = X.to(dtype), WEIGHT.to(dtype)
    with torch.set_grad_enabled(has_gradient):
        before = ops.rms_norm(x, weight, 1e-5)
        with monkeypatch.context() as edit:
            edit.setattr(formulas, "rms_norm", louder)
            for _ in range(2):
                assert torch.equal(ops.rms_norm(x, weight, 1e-5), louder(x, weight, 1e-5))
            assert agreement.is_any_set_aside()
        assert torch.equal(ops.rms_norm(x, weight, 1e-5), before) and not agreement.is_any_set_aside()
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("minitune: rms_norm follows its formula (") and "test_agreement.py" in line and len(line) < 500
    )


def test_a_formula_with_another_gradient_is_followed_where_one_is_recorded(monkeypatch):
    """Its values are the same: only training changes."""
    own = formulas.swiglu
    monkeypatch.setattr(formulas, "swiglu", lambda gate, up: own(gate, up.detach()) + own(gate.detach(), up) * 0)
    gate, up = X.clone().requires_grad_(), X.clone().requires_grad_()
    grads = torch.autograd.grad(ops.swiglu(gate, up).sum(), [gate, up])
    assert grads[0].any() and not grads[1].any()


def with_z_loss(hidden, head, targets, own=formulas.cross_entropy):
    return own(hidden, head, targets) + 1e-4 * head(hidden).float().logsumexp(-1).square()


def with_smoothing(hidden, head, targets, own=formulas.cross_entropy):
    return 0.99 * own(hidden, head, targets) - 0.01 * head(hidden).float().log_softmax(-1).mean(-1)


def with_softcap(q, k, v, mask=None, own=formulas.attention):
    return own(50 * (q / 50).tanh(), k, v, mask)


@pytest.mark.parametrize(
    "edited, versions",
    [
        (with_z_loss, ["torch", "torch, without a gradient"]),
        (with_smoothing, ["torch", "torch, without a gradient"]),
        (with_softcap, ["torch", "torch, causal", "torch, over a cache"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_edit_smaller_than_the_rounding_of_16_bits_is_followed(edited, versions, dtype, monkeypatch):
    operation = "attention" if edited is with_softcap else "cross_entropy"
    for version in versions:
        x, is_recorded = X.to(dtype), version in agreement.RECORDED
        with torch.set_grad_enabled(is_recorded):
            assert agreement.agrees(operation, version, x)
            with monkeypatch.context() as edit:
                edit.setattr(formulas, operation, edited)
                assert not agreement.agrees(operation, version, x), version


@torch.no_grad()
def test_a_formula_that_changes_its_arguments_or_returns_another_dtype_is_followed(monkeypatch):
    gate, up = X.bfloat16(), X.bfloat16() + 1
    monkeypatch.setattr(formulas, "swiglu", lambda gate, up: torch.nn.functional.silu(gate.clamp_(max=0.1)) * up)
    assert torch.equal(ops.swiglu(gate.clone(), up), formulas.swiglu(gate.clone(), up))
    own = formulas.rms_norm
    monkeypatch.setattr(formulas, "rms_norm", lambda x, weight, eps: own(x, weight, eps).float())
    assert ops.rms_norm(gate, up[0], 1e-5).dtype is torch.float32


@torch.no_grad()
def test_a_formula_may_be_any_callable(monkeypatch):
    monkeypatch.setattr(formulas, "gelu", torch.nn.functional.gelu)
    torch.testing.assert_close(ops.gelu(X), torch.nn.functional.gelu(X))
    monkeypatch.setattr(formulas, "gelu", torch.nn.functional.silu)
    assert torch.equal(ops.gelu(X), torch.nn.functional.silu(X)) and replay.formula_codes()


@pytest.mark.parametrize("name", ["C", "torch"])
@needs_c
def test_a_version_that_is_wrong_in_one_value_is_set_aside_alone(name, monkeypatch, capsys):
    own = agreement.VERSIONS["swiglu", name]

    def wrong(gate, up):
        out = own(gate, up).clone()
        out.view(-1)[-1] += 0.1
        return out

    monkeypatch.setitem(agreement.VERSIONS, ("swiglu", name), wrong)
    with torch.no_grad():
        others = {"C": "torch", "torch": "C"}[name]
        assert not agreement.agrees("swiglu", name, X) and agreement.agrees("swiglu", others, X)
    assert name in capsys.readouterr().err or name == "torch"


def test_a_formula_that_fails_raises_its_own_error_where_it_is_called(monkeypatch):
    def broken(x, weight, eps):
        raise ZeroDivisionError("of the formula")

    monkeypatch.setattr(formulas, "rms_norm", broken)
    with pytest.raises(ZeroDivisionError, match="of the formula"):
        ops.rms_norm(X, WEIGHT, 1e-5)


class Calls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


def test_the_check_leaves_random_numbers_threads_gradients_and_modes_alone():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    x = X.clone().requires_grad_()
    seen = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
        Calls() as calls,
    ):
        out = ops.rms_norm(x, WEIGHT, 1e-5)
    assert len(agreement._verdicts) == 1 and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert len(seen) == 3  # x, the weight and a number a row
    assert calls.names and "cos" not in calls.names  # which the check calls, in a thread of its own
    out.sum().backward()
    with torch.inference_mode():
        ops.layer_norm(x, WEIGHT, WEIGHT, 1e-5)


@needs_c
def test_the_check_is_not_on_the_tape_that_records():
    with torch.no_grad():
        tape = replay.Tape()
        tape.record(lambda x: ops.rms_norm(x, WEIGHT, 1e-5), X.clone())
        assert tape.fault is None and agreement.known(("rms_norm", "C", X.dtype, "cpu", False), formulas.rms_norm)
        tape.inputs[0].mul_(3)
        assert torch.equal(tape.replay(), ops.rms_norm(3 * X, WEIGHT, 1e-5))


@needs_c
def test_nothing_is_replayed_once_a_version_was_set_aside(monkeypatch):
    form = ops.CacheForm("C", torch.float32, True)
    with torch.no_grad():
        assert replay.recorder(X, form) is replay.Tape
        monkeypatch.setattr(formulas, "rms_norm", louder)
        ops.rms_norm(X, WEIGHT, 1e-5)
        assert replay.recorder(X, form) is None


def test_a_transform_and_the_meta_device_get_the_formula(monkeypatch):
    assert not agreement.agrees("rms_norm", "torch", torch.empty(2, device="meta"))
    monkeypatch.setattr(
        torch._C, "_are_functorch_transforms_active", lambda: True
    )  # as in vmap, which takes 10 s to import
    assert torch.equal(ops.rms_norm(X, WEIGHT, 1e-5), formulas.rms_norm(X, WEIGHT, 1e-5))
    assert not agreement._verdicts


@needs_c
@pytest.mark.parametrize("what", ["quantize", "dequantize", "matmul"])
def test_a_backend_of_4_bit_weights_with_other_numbers_is_set_aside(what, monkeypatch, capsys):
    weight, x = torch.linspace(-1, 1, 128 * 9).view(9, 128), torch.linspace(-1, 1, 3 * 128).view(3, 128)
    packed, absmax = nf4_reference.quantize(weight)
    whole = nf4_reference.dequantize(packed, absmax, torch.empty_like(weight))
    own = getattr(nf4_cpu, what)

    def wrong(*arguments):
        results = own(*arguments)
        (results[0] if what == "quantize" else results).view(-1)[0] += 1
        return results

    monkeypatch.setattr(nf4_cpu, what, wrong)
    assert torch.equal(nf4.quantize(weight)[0], packed)
    assert torch.equal(nf4.dequantize(packed, absmax, (9, 128), torch.float32), whole)
    torch.testing.assert_close(nf4.matmul(x, packed, absmax, (9, 128)), x @ whole.T)
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_an_edit_of_double_quantised_scales_is_followed_for_every_number_of_rows(rows, monkeypatch):
    packed, absmax = nf4.quantize(torch.linspace(-1, 1, 128 * 9).view(9, 128))
    nested, x = nf4_reference.double_quantize(absmax), torch.linspace(-1, 1, rows * 128).view(rows, 128)
    before, own = nf4.matmul(x, packed, nested, (9, 128)), nf4_reference.double_dequantize
    monkeypatch.setattr(agreement, "_verdicts", {})
    monkeypatch.setattr(nf4_reference, "double_dequantize", lambda *nested: 1.5 * own(*nested))
    torch.testing.assert_close(nf4.matmul(x, packed, nested, (9, 128)), 1.5 * before)


def test_the_fingerprint_of_the_formulas_is_of_their_code_alone(monkeypatch, tmp_path):
    whole = agreement.formulas_fingerprint()
    text = Path(formulas.__file__).read_text()
    for number, (new, is_same) in enumerate(
        [
            (text.replace('"""', '"""Also: ', 1) + "\n# more\n", True),
            (text.replace("return F.silu", "return 2 * F.silu"), False),
        ]
    ):
        (tmp_path / f"{number}.py").write_text(new)
        monkeypatch.setattr(formulas, "__file__", str(tmp_path / f"{number}.py"))
        agreement.formulas_fingerprint.cache_clear()
        assert (agreement.formulas_fingerprint() == whole) is is_same
    monkeypatch.undo()
    agreement.formulas_fingerprint.cache_clear()


def test_the_product_of_a_4_bit_weight_and_its_gradient_follow_the_formula_of_linear(monkeypatch):
    weight, x = torch.linspace(-1, 1, 128 * 9).view(9, 128), torch.linspace(-1, 1, 3 * 128).view(3, 128)
    packed, absmax = nf4.quantize(weight)
    own = formulas.linear
    monkeypatch.setattr(formulas, "linear", lambda x, weight, bias=None: -own(x, weight, bias))
    expected = -x @ nf4.dequantize(packed, absmax, (9, 128), torch.float32).T
    torch.testing.assert_close(nf4.matmul(x, packed, absmax, (9, 128)), expected)
    given = x.clone().requires_grad_()
    out = nf4.matmul(given, packed, absmax, (9, 128))
    (grad,) = torch.autograd.grad(out.sum(), given)
    torch.testing.assert_close(out.detach(), expected)
    torch.testing.assert_close(grad, -nf4.dequantize(packed, absmax, (9, 128), torch.float32).sum(0).expand(3, 128))


@pytest.mark.parametrize("operation, version", [key for key in agreement.VERSIONS if key[1] != "Triton"])
def test_every_version_agrees_in_every_dtype_that_it_takes(operation, version):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if version.startswith("C"):
        if not ops_cpu.runs_here(None):
            pytest.skip("there is no C compiler")
        dtypes = [d for d in ops_cpu.DTYPES if operation != "linear" or ops_cpu.max_rows(d)]
    if version == "oneDNN":
        dtypes = (torch.float32,) if ops.has_one_dnn() else ()
    for dtype in dtypes:
        for has_gradient in {False, version in agreement.RECORDED}:
            assert agreement.difference(operation, version, dtype, torch.device("cpu"), has_gradient) is None


def test_attention_over_gathered_keys_is_attention_over_the_cache():
    """What remains where every faster version is set aside: masks over prompts, several sequences, grouped heads."""
    B, n, H, H_kv, T, P, S, D = 2, 3, 4, 2, 2, 5, 4, 6
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B * n, H, T, D, generator=generator)
    stores = [torch.randn(*shape, D, generator=generator) for shape in ((B, H_kv, P), (B, H_kv, P), (B * n, H_kv, S))]
    stores.append(torch.randn(B * n, H_kv, S, D, generator=generator))
    new_mask = torch.tensor([[True, False, True, False], [True, True, True, False]])[None, None, None]
    stored = torch.arange(P) < torch.tensor([[P], [3]])
    windowed = torch.rand(B, 1, n, 1, T, P, generator=generator) > 0.3
    for prompt_mask in (None, stored[:, None, None, None, None], windowed):
        found = ops.gathered_attention(q, stores, new_mask, prompt_mask)
        torch.testing.assert_close(found, ops_torch.attention_over_cache(q, stores, new_mask, prompt_mask))
