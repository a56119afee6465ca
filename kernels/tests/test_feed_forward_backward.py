"""Gradients of the feed-forward half without a GPU: reference against autograd, CPU path, fake implementation."""

import pytest
import torch
import torch.nn.functional as F
from feed_forward_cases import FeedForwardCase, cases, inputs

from convfirst_kernels import feed_forward_backward

op = torch.ops.convfirst.feed_forward_backward
ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def test_every_pair_of_choices_is_tested():
    rows = cases()
    assert len(rows) < 60
    assert {(c.channels, c.dtype) for c in rows} == {
        (c, d) for c in (32, 40, 64, 96, 128, 160, 192, 256) for d in ("float16", "bfloat16")
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bare", [True, False])
def test_reference_is_what_autograd_gives(activation, norm, bare):
    n, c, h, w, hidden, eps = 3, 16, 4, 5, 64, 1e-6
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, dy = normal(n * h * w, c).requires_grad_(), normal(n * h * w, c)
    parameters = [normal(*shape).requires_grad_() for shape in ((hidden, c), (hidden,), (c, hidden), (c,), (c,))]
    w1, b1, w2, b2, scale = parameters if not bare else (parameters[0], None, parameters[2], None, None)
    drop = None if bare else torch.tensor([0.0, 1.25, 1.25], dtype=torch.float64)
    a = F.layer_norm(rows, (c,), eps=eps) if norm else rows
    y = F.linear(ACTIVATIONS[activation](F.linear(a, w1, b1)), w2, b2)
    if not bare:
        y = y * scale * drop.repeat_interleave(h * w)[:, None]
    present = [rows, w1, w2] if bare else [rows, w1, b1, w2, b2, scale]
    expected = torch.autograd.grad(y, present, dy)

    def image(x: torch.Tensor) -> torch.Tensor:
        return x.detach().view(n, h, w, c).permute(0, 3, 1, 2)

    rstd = (rows.var(1, unbiased=False) + eps).rsqrt().detach() if norm else None
    arguments = [None if t is None else t.detach() for t in (w1, b1, w2, b2, scale, drop)]
    results = op(image(a), image(dy), rstd, *arguments, activation)
    kept = [results[i] for i in ((0, 1, 3) if bare else range(6))]
    for result, other in zip(kept, expected, strict=True):
        torch.testing.assert_close(result, other)
    assert results[5].numel() == (0 if bare else c)


SMALL = [
    FeedForwardCase(2, 3, 5, 40, 192, "bfloat16", "gelu", layer_scale=1e-6, sample_scale=True),
    FeedForwardCase(1, 2, 2, 64, 256, "float16", "relu", norm=False, biases=False, layer_scale=0.0),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_opcheck(case, seed):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.default, inputs(case, seed, "cpu"), test_utils=tests)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_results_have_the_promised_form(case, seed):
    da, *gradients = op(*inputs(case, seed, "cpu"))
    c, hidden = case.channels, case.hidden
    assert da.shape == (case.batch * case.height * case.width, c) and da.dtype == getattr(torch, case.dtype)
    shapes = [(hidden, c), (hidden,), (c, hidden), (c,), (c if case.layer_scale else 0,)]
    assert [tuple(g.shape) for g in gradients] == shapes
    assert all(g.dtype == torch.float32 and g.is_contiguous() for g in gradients)


def test_empty_batch():
    da, *gradients = op(*inputs(FeedForwardCase(0, 4, 4, 64, 256), 0, "cpu"))
    assert da.shape == (0, 64)
    assert all(not g.any() for g in gradients)


def test_layer_scale_of_a_millionth_survives_float16(seed):
    """The plain reference loses it: its product with dy is below float16's least number."""
    case = FeedForwardCase(2, 6, 6, 64, 256, "float16", layer_scale=1e-6, norm=False)
    arguments = inputs(case, seed, "cpu")
    truth = feed_forward_backward.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in arguments))
    unit, scaled = feed_forward_backward.scaled_project_weight(arguments[5], arguments[7])
    assert float(scaled.abs().max()) > 1e-3
    restored = scaled.double() * unit.double()
    torch.testing.assert_close(restored, arguments[5].double() * arguments[7].double()[:, None], rtol=2e-3, atol=1e-10)
    assert float(truth[1].abs().max()) > 0
