"""Direct convolution without a GPU: what it computes, its gradients, the operators, the planner, refusals."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from convfirst_kernels import direct_conv2d
from convfirst_kernels.direct.convolution import plan_direct
from convfirst_kernels.direct.reference import ACTIVATIONS

op = torch.ops.convfirst.direct_conv2d
backward_op = torch.ops.convfirst.direct_conv2d_backward

# N, C, H, W, K, R, S, stride, padding, dilation
CASES = [
    (2, 3, 11, 13, 8, 3, 3, (2, 2), (1, 1), (1, 1)),
    (1, 8, 9, 7, 5, 1, 1, (1, 1), (0, 0), (1, 1)),
    (3, 5, 12, 10, 16, 5, 3, (1, 2), (2, 0), (2, 1)),
    (1, 16, 4, 4, 24, 4, 4, (4, 4), (0, 0), (1, 1)),
]
SAME = (1, 1, 1, 1, 1, 1)


def tensors(case: tuple, dtype=torch.float32, requires_grad: bool = False) -> tuple:
    n, c, h, w, k, r, s = case[:7]
    generator = torch.Generator().manual_seed(sum(case[:7]))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    x = normal(n, c, h, w).contiguous(memory_format=torch.channels_last)
    weight = normal(k, c, r, s).contiguous(memory_format=torch.channels_last)
    return tuple(t.requires_grad_(requires_grad) for t in (x, weight, normal(k).float()))


def flat(case: tuple) -> tuple[int, ...]:
    return tuple(itertools.chain(*case[7:]))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_the_convolution(case, activation):
    x, weight, bias = tensors(case)
    expected = ACTIVATIONS[activation](F.conv2d(x, weight, bias, *case[7:]))
    for y in (
        op(x, weight, bias, *flat(case), activation),
        direct_conv2d(x, weight, bias, *case[7:], activation=activation),
    ):
        torch.testing.assert_close(y, expected)
        assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(op(x, weight, None, *flat(case), "none"), F.conv2d(x, weight, None, *case[7:]))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(case, activation):
    ours, theirs = tensors(case, requires_grad=True), tensors(case, requires_grad=True)
    y = op(*ours, *flat(case), activation)
    expected = ACTIVATIONS[activation](F.conv2d(*theirs, *case[7:]))
    upstream = torch.linspace(-1, 1, y.numel()).view(y.shape)
    gradients = (torch.autograd.grad(y, ours, upstream), torch.autograd.grad(expected, theirs, upstream))
    for gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_gradients_that_are_asked_for(wanted):
    arguments = [t.requires_grad_(asked) for t, asked in zip(tensors(CASES[0]), wanted, strict=True)]
    y = op(*arguments, *flat(CASES[0]), "relu")
    y.sum().backward()
    assert tuple(t.grad is not None for t in arguments) == wanted
    results = backward_op(y.detach(), *arguments, *flat(CASES[0]), "relu", list(wanted))
    assert [g.numel() > 0 for g in results] == list(wanted)


def test_second_derivative_is_refused():
    x, weight, _ = tensors(CASES[0], requires_grad=True)
    (grad,) = torch.autograd.grad(op(x, weight, None, *flat(CASES[0]), "none").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="direct_conv2d has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_opcheck(dtype):
    arguments = (*tensors(CASES[0], dtype, requires_grad=True), *flat(CASES[0]), "silu")
    torch.library.opcheck(op.default, arguments)
    x, weight, bias = tensors(CASES[0], dtype)
    grad = torch.ones_like(op(x, weight, bias, *arguments[3:]))
    torch.library.opcheck(backward_op.default, (grad, x, weight, bias, *arguments[3:], [True] * 3))
    sizes = flat(CASES[0])
    torch.library.opcheck(torch.ops.convfirst.direct_conv2d_dgrad.default, (grad, weight, 11, 13, *sizes))
    torch.library.opcheck(torch.ops.convfirst.direct_conv2d_wgrad.default, (grad, x, 3, 3, *sizes))


def test_compile():
    arguments = tensors(CASES[2])

    def function(x):
        return direct_conv2d(x * 2, *arguments[1:], *CASES[2][7:], activation="gelu", kernels="off") + 1

    torch.testing.assert_close(
        torch.compile(function, fullgraph=True, backend="aot_eager")(arguments[0]), function(arguments[0])
    )


def test_autocast_and_layouts():
    x, weight, bias = tensors(CASES[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert direct_conv2d(x, weight, bias).dtype == torch.bfloat16
    y = direct_conv2d(x.contiguous(), weight.contiguous(), bias)
    torch.testing.assert_close(y, F.conv2d(x, weight, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 2}, "groups=2; direct_conv2d takes groups=1"),
        ({"activation": "elu"}, "activation='elu'; accepted: 'none', 'relu', 'silu', 'gelu'"),
        ({"stride": (1, 2, 3)}, r"stride=\(1, 2, 3\); accepted: one integer or a pair"),
        ({"padding": "same"}, "padding='same'; accepted"),
        ({"kernels": "on"}, "kernels='on'; accepted: 'auto', 'required', 'off'"),
        ({"kernels": "required"}, "kernels='required', but x is on cpu"),
    ],
)
def test_the_function_refuses(change, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        direct_conv2d(*tensors(CASES[0]), **change)


def _refusals() -> list:
    x, weight, bias = tensors(CASES[0])
    cases = []
    cases.append(
        (
            (x.double(), weight, bias, *SAME, "none"),
            "x is torch.float64; supported are torch.float16, torch.bfloat16 and",
        )
    )
    cases.append(((x[0], weight, bias, *SAME, "none"), r"x has shape \[3, 11, 13\]; expected 4 dimensions"))
    cases.append(((x.contiguous(), weight, bias, *SAME, "none"), "expected dense channels_last .*use x.contiguous"))
    cases.append(((x, weight.half(), bias, *SAME, "none"), "weight is torch.float16; expected x's dtype torch.float32"))
    cases.append(
        (
            (x, weight[:, :2].contiguous(memory_format=torch.channels_last), bias, *SAME, "none"),
            r"weight has shape \[8, 2, 3, 3\]",
        )
    )
    cases.append(((x, weight, bias[:4], *SAME, "none"), r"bias has shape \[4\]; expected \[8\] = \[filters\]"))
    cases.append(((x, weight, bias.half(), *SAME, "none"), "bias is torch.float16; expected torch.float32"))
    cases.append(((x, weight, bias, 0, 1, *SAME[2:], "none"), r"stride is \(0, 1\); both must be at least 1"))
    cases.append(((x, weight, bias, 1, 1, -1, 0, 1, 1, "none"), r"padding is \(-1, 0\); both must be at least 0"))
    cases.append(
        (
            (x, weight, bias, 1, 1, 0, 0, 1, 7, "none"),
            "x's width is 13 with padding 0; the filter of 3 with dilation 7 needs 15",
        )
    )
    cases.append(
        ((x, weight, bias, *SAME, "tanh"), "activation is 'tanh'; supported are 'none', 'relu', 'silu' and 'gelu'")
    )
    return cases


@pytest.mark.parametrize(("arguments", "message"), _refusals(), ids=lambda v: v if isinstance(v, str) else "")
def test_the_operator_refuses(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        op(*arguments)


def test_empty_batch():
    x, weight, bias = tensors(CASES[0], requires_grad=True)
    y = op(x[:0], weight, bias, *flat(CASES[0]), "relu")
    assert y.shape == (0, 8, 6, 7)
    y.sum().backward()
    assert weight.grad.count_nonzero() == 0


PLANS = [
    ((128, 192, 13, 13), (384, 192, 3, 3), {"padding": 1}, "sm90_gemm"),
    ((128, 96, 24, 24), (256, 96, 5, 5), {}, "sm90_gemm"),
    ((8, 64, 14, 14), (128, 64, 1, 1), {}, "sm90_gemm"),
    ((128, 3, 227, 227), (64, 3, 11, 11), {"stride": 4}, "sm90_first_layer"),
    ((128, 3, 224, 224), (96, 3, 4, 4), {"stride": 4}, "sm90_first_layer"),
    ((128, 3, 128, 128), (96, 3, 11, 11), {}, "sm90_first_layer"),
    ((8, 20, 14, 14), (30, 20, 3, 3), {}, "sm80_forward"),
    ((8, 64, 14, 14), (30, 64, 3, 3), {}, "sm80_forward"),
    ((8, 64, 400, 400), (32, 64, 3, 3), {"dilation": 150}, "sm80_forward"),
    ((8, 64, 14, 14), (64, 64, 3, 3), {"dtype": "float32"}, "sm80_forward"),
    ((128, 64, 27, 27), (192, 64, 5, 5), {"padding": 2, "dtype": "float32"}, "sm90_float_512x64"),
    ((128, 384, 13, 13), (256, 384, 3, 3), {"padding": 1, "dtype": "float32"}, "sm90_float"),
    ((128, 1024, 12, 12), (1024, 1024, 3, 3), {"padding": 1, "dtype": "float32"}, "sm90_float"),
    ((128, 30, 27, 27), (192, 30, 5, 5), {"padding": 2, "dtype": "float32"}, "sm80_forward"),
    ((128, 64, 56, 56), (64, 64, 3, 3), {"direction": "dgrad", "stride": 2}, "sm90_dgrad"),
    ((8, 64, 14, 14), (64, 64, 3, 3), {"direction": "dgrad", "stride": 2, "dilation": 2}, "sm80_dgrad"),
    ((128, 96, 24, 24), (256, 96, 5, 5), {"direction": "wgrad"}, "sm90_wgrad"),
    ((128, 3, 227, 227), (64, 3, 11, 11), {"direction": "wgrad", "stride": 4}, "sm90_first_layer_wgrad"),
    ((128, 96, 13, 13), (256, 96, 3, 3), {"padding": 1, "direction": "dgrad", "dtype": "float32"}, "sm90_float_dgrad"),
    ((8, 20, 14, 14), (30, 20, 3, 3), {"direction": "wgrad"}, "sm80_wgrad"),
    ((8, 64, 14, 14), (64, 64, 3, 3), {"direction": "wgrad", "dtype": "float32"}, "sm80_wgrad"),
]


@pytest.mark.parametrize(("shape", "weight", "options", "variant"), PLANS, ids=str)
def test_plan(shape, weight, options, variant):
    """Every problem has a variant on every device; Hopper's own is taken where it covers the problem."""
    answer = plan_direct(shape, weight, device="h100", **options)
    available = [row["name"] for row in answer["candidates"] if not row["refusal"]]
    if any(name.startswith("sm90") for name in available):  # the build has that path
        assert answer["chosen"].startswith(variant)
    for row in answer["candidates"]:
        if not row["refusal"]:
            assert 0 < row["config"]["shared_memory"] <= 232448 and row["config"]["grid"] >= 1
    for name in ("a100", "rtx3090"):
        chosen = plan_direct(shape, weight, device=name, **options)["chosen"]
        assert chosen == f"sm80_{options.get('direction', 'forward')}"


@pytest.mark.parametrize(
    ("shape", "weight", "options", "variant"),
    [
        ((128, 4, 128, 128), (96, 4, 11, 11), {}, "sm90_first_layer_any"),
        ((8, 1, 64, 64), (32, 1, 5, 5), {"stride": 2}, "sm90_first_layer_any"),
    ],
    ids=str,
)
def test_what_has_not_run_on_a_gpu_runs_where_it_is_asked_for(shape, weight, options, variant):
    answer = plan_direct(shape, weight, device="h100", **options)
    if variant not in [row["name"] for row in answer["candidates"]]:
        pytest.skip("a build without the Hopper path")
    assert answer["chosen"] != variant
    assert plan_direct(shape, weight, device="h100", path=variant, **options)["chosen"] == variant


# What the H200 measured to be the best tile (NOTES.md), or within 3 % of it.
TILES = [
    ((128, 64, 27, 27), (192, 64, 5, 5), 2, ("192x192",)),
    ((128, 384, 13, 13), (256, 384, 3, 3), 1, ("192x128", "128x128")),
    ((128, 96, 24, 24), (256, 96, 5, 5), 0, ("256x128", "128x256")),
]


# Filters of the weight gradient by channels of taps, measured best or within 3 % of it.
WGRAD_TILES = [
    ((128, 64, 27, 27), (192, 64, 5, 5), 2, ("192x128",)),
    ((128, 192, 13, 13), (384, 192, 3, 3), 1, ("192x192", "128x256")),
    ((128, 384, 13, 13), (256, 384, 3, 3), 1, ("256x192", "256x128")),
    ((128, 256, 13, 13), (256, 256, 3, 3), 1, ("128x256", "256x128")),
    ((128, 96, 24, 24), (256, 96, 5, 5), 0, ("256x192",)),
    ((128, 256, 12, 12), (512, 256, 3, 3), 1, ("128x256", "256x128")),
    ((128, 512, 12, 12), (1024, 512, 3, 3), 1, ("128x256", "256x128")),
    ((128, 1024, 12, 12), (1024, 1024, 3, 3), 1, ("256x192",)),
]


# Batch, channels, filters and side of VGG-E's layers: what an H100 measured fastest, or within 5 % of it (NOTES.md).
FEW_PIXELS = [
    ((1, 3, 64, 224), ("few_taps",)),
    ((64, 3, 64, 224), ("few_taps",)),
    ((1, 64, 64, 224), ("resident_halo",)),
    ((1, 64, 128, 112), ("resident_halo",)),
    ((1, 128, 128, 112), ("halo_128x128",)),
    ((1, 128, 256, 56), ("halo_128x64",)),
    ((1, 256, 256, 56), ("halo_128x64", "halo_128x128x2")),
    ((1, 256, 512, 28), ("halo_128x64x2",)),
    ((1, 512, 512, 28), ("halo_128x64x2", "halo_128x128x4")),
    ((1, 512, 512, 14), ("halo_128x64x4",)),
    ((2, 512, 512, 28), ("halo_128x128x2",)),
    ((2, 512, 512, 14), ("halo_128x64x2",)),
    ((4, 512, 512, 28), ("halo_128x128", "gemm_128x128")),
    ((4, 512, 512, 14), ("halo_128x64x2",)),
    ((8, 64, 64, 224), ("resident_halo",)),
    ((8, 64, 128, 112), ("resident_halo",)),
    ((8, 128, 128, 112), ("gemm_256x128",)),
    ((8, 256, 256, 56), ("gemm_192x128", "gemm_128x256", "gemm_256x128", "gemm_128x128")),
    ((8, 256, 512, 28), ("gemm_192x128",)),
    ((8, 512, 512, 28), ("gemm_192x128",)),
    ((8, 512, 512, 14), ("halo_128x128x2",)),
    ((64, 64, 64, 224), ("resident_halo",)),
    ((64, 128, 128, 112), ("gemm_192x128",)),
    ((64, 512, 512, 28), ("gemm_192x128", "gemm_128x256", "gemm_256x128")),
    ((64, 512, 512, 14), ("gemm_192x128",)),
]


@pytest.mark.parametrize(("layer", "variants"), FEW_PIXELS, ids=str)
def test_the_planner_takes_what_was_measured_best_of_few_pixels(layer, variants):
    batch, channels, filters, side = layer
    chosen = plan_direct((batch, channels, side, side), (filters, channels, 3, 3), padding=1, device="h100")["chosen"]
    if chosen == "sm80_forward":
        pytest.skip("a build without the Hopper path")
    assert chosen.removeprefix("sm90_") in variants


@pytest.mark.parametrize(("shape", "weight", "padding", "tiles"), WGRAD_TILES, ids=str)
def test_the_planner_takes_the_weight_gradient_tile_that_was_measured_best(shape, weight, padding, tiles):
    chosen = plan_direct(shape, weight, padding=padding, direction="wgrad", device="h200")["chosen"]
    if chosen == "sm80_wgrad":
        pytest.skip("a build without the Hopper path")
    assert chosen.removeprefix("sm90_wgrad_") in tiles


@pytest.mark.parametrize(("shape", "weight", "padding", "tiles"), TILES, ids=str)
def test_the_planner_takes_the_tile_that_was_measured_best(shape, weight, padding, tiles):
    chosen = plan_direct(shape, weight, padding=padding, device="h200")["chosen"]
    if chosen == "sm80_forward":
        pytest.skip("a build without the Hopper path")
    assert chosen.removeprefix("sm90_gemm_") in tiles
