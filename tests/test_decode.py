"""The product of few rows with a bf16 weight: torch's, up to one rounding, and taken only where it may be."""

import pytest
import torch
from minitune_kernels import dense

from minitune.models.layers import Linear

pytestmark = pytest.mark.skipif(
    not dense.runs_here(None), reason="this CPU has no AVX-512 bf16, or there is no C compiler"
)


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 32), (7, 64), (33, 96), (64, 1056)])
def test_rows_are_multiplied_as_in_fp64_and_rounded_once(shape):
    weight, bias = random(*shape), random(shape[0], seed=1)
    for rows in range(1, 9):
        x = random(rows, shape[1], seed=rows)
        exact = x.double() @ weight.double().T
        size = x.double().abs() @ weight.double().abs().T
        found = dense.linear(x, weight).double()
        assert ((found - exact).abs() <= exact.abs() * 2**-8 + size * 2**-20).all()
        assert torch.equal(dense.linear(x, weight, bias), dense.linear(x, weight) + bias)


def test_a_row_does_not_depend_on_its_neighbours():
    weight, x = random(50, 128), random(8, 128, seed=1)
    whole = dense.linear(x, weight)
    for rows in range(1, 9):
        assert torch.equal(dense.linear(x[:rows], weight), whole[:rows])


def test_views_and_more_axes_are_read_where_they_lie():
    weight, x = random(16, 64), random(65, 6, seed=2)
    strided = x[1:].T  # (6, 64), its elements 6 apart
    assert torch.equal(dense.linear(strided, weight), dense.linear(strided.contiguous(), weight))
    shifted = random(16 * 64 + 1)[1:].view(16, 64)  # not aligned
    assert torch.equal(dense.linear(strided, shifted), dense.linear(strided, shifted.clone()))
    assert dense.linear(strided.reshape(2, 3, 64), weight).shape == (2, 3, 16)
    assert dense.linear(random(64), weight).shape == (16,)


def test_a_layer_takes_it_for_few_rows_without_a_gradient_only(monkeypatch):
    layer = Linear(64, 16, bias=True, dtype=torch.bfloat16)
    taken = []
    monkeypatch.setattr(dense, "linear", lambda x, *rest: taken.append(x) or x.new_zeros(*x.shape[:-1], 16))
    with torch.no_grad():
        layer(random(2, 4, 64))
        assert len(taken) == 1
        for x in (random(9, 64), random(0, 64)):
            layer(x)
        layer.float()(random(2, 64, dtype=torch.float32))
        assert len(taken) == 1
    layer.bfloat16()(random(2, 64))  # the weight wants a gradient
    assert len(taken) == 1
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITUNE_KERNELS", "torch")
        layer(random(2, 64))
    assert len(taken) == 1
