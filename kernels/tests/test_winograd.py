"""Winograd's convolution: what it computes, its gradients, the operators, what "auto" chooses, refusals."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from convfirst_kernels import winograd_conv2d
from convfirst_kernels.winograd import convolution, cook_toom, operators, reference

op = torch.ops.convfirst.winograd_conv2d
backward_op = torch.ops.convfirst.winograd_conv2d_backward
ACTIVATE = {"none": lambda y: y, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}
SHAPES = [(1, 3, 5, 7, 7), (2, 8, 8, 6, 4), (3, 1, 2, 1, 1), (1, 5, 3, 13, 2), (2, 4, 1, 9, 16)]  # N, C, K, H, W


def tensors(shape: tuple, dtype=torch.float64, requires_grad: bool = False) -> tuple:
    n, c, k, h, w = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def uniform(*size: int) -> torch.Tensor:
        return (torch.rand(*size, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)

    x = uniform(n, c, h, w).contiguous(memory_format=torch.channels_last)
    made = (x, uniform(k, c, 3, 3), uniform(k).to(torch.promote_types(dtype, torch.float32)))
    return tuple(tensor.requires_grad_(requires_grad) for tensor in made)


@pytest.mark.parametrize(("shape", "padding"), [(s, p) for s in SHAPES for p in (0, 1, 2) if min(s[3:]) + 2 * p >= 3])
@pytest.mark.parametrize("algorithm", ["f2", "f4"])
def test_is_the_convolution(shape, algorithm, padding):
    x, weight, bias = tensors(shape)
    y = winograd_conv2d(x, weight, bias, padding, algorithm=algorithm)
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, padding=padding))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("activation", ACTIVATE)
def test_activation(activation):
    x, weight, bias = tensors(SHAPES[0])
    expected = ACTIVATE[activation](F.conv2d(x, weight, bias, padding=1))
    torch.testing.assert_close(winograd_conv2d(x, weight, bias, activation=activation), expected)
    expected = ACTIVATE[activation](F.conv2d(x, weight, padding=1))
    torch.testing.assert_close(winograd_conv2d(x, weight, activation=activation), expected)


@pytest.mark.parametrize("points", [(0, 1, -1, 2, -2), (0, "1/2", "-1/2", 1, -1)])
def test_points_of_ones_own(points):
    x, weight, _ = tensors(SHAPES[0])
    y = reference.correlate(x, weight, 1, cook_toom(4, 3, points), torch.float64)
    torch.testing.assert_close(y, F.conv2d(x, weight, padding=1))


F2_BOUND = {torch.float64: 2, torch.float32: 2, torch.float16: 3, torch.bfloat16: 3}


@pytest.mark.parametrize("dtype", F2_BOUND)
def test_error_against_direct_convolution(dtype):
    """On sums as long as a layer of VGG has; "auto" leaves F(4x4, 3x3) where its error is above the bound."""
    x, weight, _ = tensors((1, 128, 8, 12, 12), dtype)
    windows = F.unfold(x.double(), 3, padding=1)[0]
    exact = weight.double().flatten(1).numpy().astype(np.longdouble) @ windows.numpy().astype(np.longdouble)
    wide = torch.promote_types(dtype, torch.float32)
    direct = (weight.to(wide).flatten(1) @ windows.to(wide)).to(dtype)

    def error(y):
        return float(abs(y.double().reshape(exact.shape).numpy() - exact).max())

    ratios = {a: error(winograd_conv2d(x, weight, algorithm=a)) / error(direct) for a in operators.ALGORITHMS}
    assert ratios["f2"] <= F2_BOUND[dtype], ratios
    assert (ratios["f4"] <= convolution.F4_BOUND[dtype]) == (dtype in convolution.F4_DTYPES), ratios


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("algorithm", ["f2", "f4"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[4]])
def test_gradients(shape, algorithm, padding):
    ours, theirs = tensors(shape, requires_grad=True), tensors(shape, requires_grad=True)
    y = winograd_conv2d(*ours, padding, algorithm=algorithm, activation="silu")
    expected = F.silu(F.conv2d(*theirs, padding=padding))
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    gradients = (torch.autograd.grad(y, ours, upstream), torch.autograd.grad(expected, theirs, upstream))
    for gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize(("algorithm", "activation"), [("f2", "none"), ("f2", "gelu"), ("f4", "relu"), ("f4", "silu")])
def test_gradcheck(algorithm, activation):
    arguments = tensors((2, 2, 3, 5, 4), requires_grad=True)
    torch.autograd.gradcheck(lambda *t: op(*t, 1, algorithm, activation), arguments)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_gradients_that_are_asked_for(wanted):
    arguments = [tensor.requires_grad_(asked) for tensor, asked in zip(tensors(SHAPES[0]), wanted, strict=True)]
    winograd_conv2d(*arguments).sum().backward()
    assert tuple(tensor.grad is not None for tensor in arguments) == wanted
    mask = list(wanted)
    shapes = [g.numel() for g in backward_op(op(*arguments, 1, "f2", "none"), *arguments, 1, "f2", "none", mask)]
    assert [size > 0 for size in shapes] == mask


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_16_bits(dtype):
    shape = (2, 16, 24, 9, 9)
    halves, wide = tensors(shape, dtype, requires_grad=True), tensors(shape, dtype)
    wide = [tensor.double().requires_grad_() for tensor in wide]
    y = winograd_conv2d(*halves)
    y.backward(torch.ones_like(y))
    F.conv2d(*wide, padding=1).sum().backward()
    for ours, theirs in zip(halves, wide, strict=True):
        assert ours.grad.dtype == ours.dtype
        error = (ours.grad.double() - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert error <= 4 * torch.finfo(dtype).eps


def test_second_derivative_is_refused():
    x, weight, _ = tensors(SHAPES[0], requires_grad=True)
    (gradient,) = torch.autograd.grad(winograd_conv2d(x, weight).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="winograd_conv2d has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
def test_opcheck(dtype, biased):
    x, weight, bias = tensors(SHAPES[1], dtype, requires_grad=True)
    torch.library.opcheck(op.default, (x, weight, bias if biased else None, 1, "f2", "silu"))
    plain = [tensor.detach() for tensor in (x, weight, bias)]
    for mask in ([True, True, biased], [False, True, False]):
        given = (*plain[:2], plain[2] if biased else None, 1, "f4", "relu", mask)
        torch.library.opcheck(backward_op.default, (torch.ones(2, 8, 6, 4, dtype=dtype), *given))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_break(dynamic):
    x, weight, bias = tensors(SHAPES[1], torch.float32, requires_grad=True)

    def network(x):
        return winograd_conv2d(x, weight, bias, activation="relu").sum()

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for part in (x, x[:, :, :5]):
        ours, theirs = compiled(part), network(part)
        torch.testing.assert_close(ours, theirs)
        gradients = (torch.autograd.grad(y, (x, weight)) for y in (ours, theirs))
        for gradient, other in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, other)


def test_autocast():
    x, weight, bias = tensors(SHAPES[1], torch.float32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = winograd_conv2d(x, weight, bias)
        y.sum().backward()
    expected = winograd_conv2d(x.detach().bfloat16(), weight.detach().bfloat16(), bias.detach())
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "size", "algorithm"),
    [
        (torch.float32, (14, 14), "f4"),
        (torch.float32, (7, 7), "f4"),
        (torch.float32, (5, 5), "f2"),  # as many multiplications, and the smaller error
        (torch.float32, (2, 2), "f2"),
        (torch.float64, (14, 14), "f4"),
        (torch.float16, (14, 14), "f2"),
        (torch.bfloat16, (56, 56), "f2"),
    ],
)
def test_auto(dtype, size, algorithm):
    assert convolution.choose(dtype, *size) == algorithm
    x, weight, _ = tensors((1, 2, 2, *size), dtype)
    given, chosen = winograd_conv2d(x, weight, algorithm=algorithm), winograd_conv2d(x, weight)
    assert torch.equal(given, chosen)


REFUSALS = {
    "dtype": (
        {"x": torch.ones(1, 4, 5, 5, dtype=torch.int32)},
        "x is torch.int32; supported are torch.float32, torch.float16, torch.bfloat16 and torch.float64",
    ),
    "dimensions": (
        {"x": torch.ones(4, 5, 5)},
        "x has shape [4, 5, 5]; expected 4 dimensions [batch, channels, height, width]",
    ),
    "no images": ({"x": torch.ones(0, 4, 5, 5)}, "x has shape [0, 4, 5, 5]; every extent must be at least 1"),
    "filter": (
        {"weight": torch.ones(6, 4, 5, 5)},
        "weight has shape [6, 4, 5, 5]; expected [*, 4, 3, 3] = [output channels, channels, 3, 3]",
    ),
    "channels": (
        {"weight": torch.ones(6, 2, 3, 3)},
        "weight has shape [6, 2, 3, 3]; expected [*, 4, 3, 3] = [output channels, channels, 3, 3]",
    ),
    "bias": ({"bias": torch.ones(4)}, "bias has shape [4]; expected [6] = [output channels]"),
    "padding": ({"padding": 3}, "padding is 3; supported are 0, 1 and 2"),
    "small image": (
        {"x": torch.ones(1, 4, 2, 5), "padding": 0},
        "x with padding 0 is 2 x 5; the filter needs 3 x 3",
    ),
    "activation": (
        {"activation": "elu"},
        "activation is 'elu'; supported are 'none', 'relu', 'silu' and 'gelu'",
    ),
}


@pytest.mark.parametrize("algorithm", ["auto", "f2"])
@pytest.mark.parametrize("what", REFUSALS)
def test_refuses(what, algorithm):
    change, message = REFUSALS[what]
    given = {"x": torch.ones(1, 4, 5, 5), "weight": torch.ones(6, 4, 3, 3), "bias": None} | change
    with pytest.raises(RuntimeError, match=f"^winograd_conv2d: {re.escape(message)}$"):
        winograd_conv2d(**given, algorithm=algorithm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(6, 4, 3, 3).half()}, "weight is torch.float16; expected x's dtype torch.float32"),
        ({"weight": torch.ones(6, 4, 3, 3, device="meta")}, "weight is on meta; expected x's device cpu"),
        ({"bias": torch.ones(6).half()}, "bias is torch.float16; expected torch.float32"),
        ({"algorithm": "auto"}, "algorithm is 'auto'; supported are 'f2' and 'f4'"),
    ],
)
def test_operator_refuses(change, message):
    given = {"x": torch.ones(1, 4, 5, 5), "weight": torch.ones(6, 4, 3, 3), "bias": None, "padding": 1}
    given |= {"algorithm": "f2", "activation": "none"}
    operators.check(**given)
    with pytest.raises(RuntimeError, match=f"^winograd_conv2d: {re.escape(message)}$"):
        op(**(given | change))


def test_options(caplog, monkeypatch):
    x, weight, _ = tensors(SHAPES[0])
    with pytest.raises(ValueError, match="^algorithm='f6'; accepted: 'auto', 'f2', 'f4'$"):
        winograd_conv2d(x, weight, algorithm="f6")
    with pytest.raises(ValueError, match="^kernels='on'; accepted: 'auto', 'required', 'off'$"):
        winograd_conv2d(x, weight, kernels="on")
    with pytest.raises(RuntimeError, match="^winograd_conv2d: kernels='required', but x is on cpu"):
        winograd_conv2d(x, weight, kernels="required")
    monkeypatch.setattr("convfirst_kernels.block._logged", set())
    for kernels in ("off", "auto", "auto"):
        winograd_conv2d(x, weight, kernels=kernels)
    reason = "x is on cpu; the kernels run on CUDA devices"
    assert [r.message for r in caplog.records] == [f"winograd_conv2d runs the PyTorch reference: {reason}"]
