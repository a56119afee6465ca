"""Gradients by kernels on a GPU: the convolution's weight gradient, and all of a block's, against float64."""

import pytest
import torch
from cases import Case, guarded, guards_intact, inputs, spacing, worst_ratio
from torch import Tensor

import convfirst_kernels as ck
from convfirst_kernels import backward, reference

pytestmark = pytest.mark.gpu
block = torch.ops.convfirst.conv_first_block
block_kept = torch.ops.convfirst.conv_first_block_kept
block_backward = torch.ops.convfirst.conv_first_block_backward
conv_weight_gradient = torch.ops.convfirst.conv_weight_gradient
TENSORS = 11
NAMES = (
    "x conv_weight conv_bias norm_weight norm_bias expand_weight expand_bias project_weight project_bias layer_scale"
).split()
TILE_ROWS = 64  # of a matrix, that errors are compared over
DTYPES = ("float16", "bfloat16")


def poison(megabytes: int = 64) -> None:
    """The caching allocator hands this to the next launches."""
    torch.full((megabytes << 18,), float("nan"), device="cuda")


def image(n: int, c: int, h: int, w: int, dtype: str, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    tensor = guarded(n, c, h, w, getattr(torch, dtype), "cuda")
    return tensor.copy_(torch.randn(n, c, h, w, generator=generator, device="cuda"))


def weight_gradient(da: Tensor, x: Tensor, kernel_size: int, group_width: int) -> Tensor:
    """PyTorch's, in x's dtype."""
    channels = x.shape[1]
    weight = x.new_empty(channels, group_width, kernel_size, kernel_size)
    d_weight = torch.nn.grad.conv2d_weight(
        x, weight.shape, da, padding=kernel_size // 2, groups=channels // group_width
    )
    return d_weight.flatten(2).permute(2, 0, 1)


def exact_weight_gradient(da: Tensor, x: Tensor, kernel_size: int, group_width: int) -> Tensor:
    """In float64, as products of matrices: cuDNN has no float64 convolution of many groups worth waiting for."""
    n, c, h, w = x.shape
    padded = torch.nn.functional.pad(x.double(), [kernel_size // 2] * 4)
    wide = da.double().reshape(n, c // group_width, group_width, h * w)
    taps = []
    for dy in range(kernel_size):
        for dx in range(kernel_size):
            moved = padded[:, :, dy : dy + h, dx : dx + w].reshape(n, c // group_width, group_width, h * w)
            taps.append(torch.einsum("ngop,ngip->goi", wide, moved).reshape(c, group_width))
    return torch.stack(taps)


GRADIENT_SHAPES = [
    (kernel_size, group_width, shape)
    for kernel_size, group_width in [(3, 8), (3, 16), (5, 8), (5, 16), (7, 8), (7, 16), (7, 1), (5, 1), (3, 1)]
    for shape in [
        (2, 64, 9, 17),
        (7, 96, 14, 14),
        (33, 32, 7, 7),
        (3, 48, 1, 1),
        (1, 1024, 3, 5),
        (5, 80, 28, 29),
        (2, 64, 56, 56),
    ]
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel_size", "group_width", "shape"), GRADIENT_SHAPES)
def test_conv_weight_gradient(kernel_size, group_width, shape, dtype, seed):
    da, x = image(*shape, dtype, seed), image(*shape, dtype, seed + 1)
    poison()
    d_weight, d_bias = conv_weight_gradient(da, x, kernel_size, group_width)
    truth = exact_weight_gradient(da, x, kernel_size, group_width)
    peer = (weight_gradient(da, x, kernel_size, group_width).double() - truth).abs().max()
    bound = 2 * peer + 2 * spacing(truth.abs().max(), torch.float32)
    assert (d_weight.double() - truth).abs().max() <= bound
    exact = da.double().sum((0, 2, 3))
    # A sum of n values in float32, one after another at worst.
    most = da.double().abs().sum((0, 2, 3)).max() * torch.finfo(torch.float32).eps
    assert (d_bias.double() - exact).abs().max() <= 2 * most
    assert guards_intact(da) and guards_intact(x)
    again = conv_weight_gradient(da, x, kernel_size, group_width)
    assert torch.equal(d_weight, again[0]) and torch.equal(d_bias, again[1]), "differs from run to run"


def problem(
    batch, height, width, channels, kernel_size=3, group_width=8, activation="silu", norm=True, dtype="bfloat16"
):
    return ck.Problem(batch, height, width, channels, 4 * channels, kernel_size, group_width, dtype, activation, norm)


def convnext(batch, height, width, channels, dtype="bfloat16"):
    return problem(batch, height, width, channels, 7, 1, "gelu", dtype=dtype)


CASES = [
    Case(make(*shape, dtype=dtype), sample_scale=True)
    for dtype in DTYPES
    for make, shape in [
        (problem, (3, 13, 17, 64)),
        (problem, (5, 14, 14, 128)),
        (problem, (9, 7, 7, 256)),
        (problem, (17, 7, 7, 512)),
        (convnext, (3, 13, 17, 96)),
        (convnext, (5, 14, 14, 192)),
        (convnext, (5, 14, 14, 384)),
        (convnext, (9, 7, 7, 768)),
    ]
]
CASES += [
    Case(problem(3, 9, 10, 64, 5, 16, "relu", False), affine=False),
    Case(problem(2, 56, 56, 64), biases=False, layer_scale=False),
    Case(problem(3, 9, 10, 128, 3, 16, "gelu"), affine=False),
    Case(convnext(1, 1, 1, 96), layer_scale=False),
]


def covered(case: Case) -> Case:
    p = case.problem
    dtype = getattr(torch, p.dtype)
    shape = p.channels, p.hidden, p.kernel_size, p.group_width, p.activation
    reason = backward.refusal(torch.device("cuda", 0), dtype, *shape)
    if reason is not None:
        pytest.skip(reason)
    return case


def leaves_of(arguments: tuple, dtype: torch.dtype | None = None) -> tuple[list, list[Tensor]]:
    """The operator's arguments with leaves for tensors, and the ten that have gradients."""
    leaves = [
        a.detach().to(dtype or a.dtype).requires_grad_(i != 10) if isinstance(a, Tensor) else a
        for i, a in enumerate(arguments)
    ]
    return leaves, [a for a in leaves[:10] if a is not None]


def differentiate(function, arguments: tuple, grad: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    leaves, tensors = leaves_of(arguments, dtype)
    return list(torch.autograd.grad(function(*leaves), tensors, grad.to(leaves[0].dtype)))


def tile_errors(result: Tensor, truth: Tensor) -> Tensor:
    """Largest error of each TILE_ROWS rows of a matrix; of all of a vector."""
    error = (result.double() - truth).abs().nan_to_num(nan=float("inf"))
    if error.dim() < 2:
        return error.max()[None]
    rows = error.flatten(0, -2).amax(1)
    return torch.stack([part.max() for part in rows.split(TILE_ROWS)])


def check_gradients(ours: list[Tensor], arguments: tuple, grad: Tensor) -> None:
    """Each within twice the error of PyTorch's own in the same dtype plus two quanta."""
    truth = differentiate(reference.conv_first_block, arguments, grad, torch.float64)
    peer = differentiate(reference.conv_first_block, arguments, grad)
    present = [name for name, a in zip(NAMES, arguments, strict=False) if a is not None]
    bad = []
    for name, result, exact, theirs in zip(present, ours, truth, peer, strict=True):
        if name == "x":
            ratio = worst_ratio(result, exact, theirs)
        else:
            bound = 2 * tile_errors(theirs, exact) + 2 * spacing(exact.abs().max(), arguments[0].dtype)
            ratio = float((tile_errors(result, exact) / bound).max())
        if ratio > 1:
            bad.append(f"{name} {ratio:.2f}x its bound")
    assert not bad, ", ".join(bad)


def keep_from_zero(arguments: tuple) -> None:
    """Biases of six deviations, of either sign, for the hidden units.

    ReLU's derivative jumps at zero: where rounding moves a value across it, two right gradients differ by a whole
    product, PyTorch's own from float64's as well, and a bound by PyTorch's error is a matter of chance.
    """
    x, conv_weight, conv_bias, *_, group_width = arguments[:12]
    a = reference.conv(x.float(), conv_weight.float(), conv_bias, group_width).permute(0, 2, 3, 1)
    expand_weight, expand_bias = arguments[5:7]
    hidden = torch.nn.functional.linear(a, expand_weight.float())
    signs = torch.where(torch.arange(len(expand_bias), device=x.device) % 2 == 0, 6.0, -6.0)
    expand_bias.copy_(signs * hidden.std() - hidden.mean((0, 1, 2)))


@pytest.mark.parametrize("case", CASES, ids=str)
class TestBlock:
    def test_gradients(self, case, seed):
        arguments = inputs(covered(case), seed)
        if case.problem.activation == "relu":
            keep_from_zero(arguments)
        grad = torch.randn_like(arguments[0])
        poison()
        ours = differentiate(block, arguments, grad)
        check_gradients(ours, arguments, grad)
        assert guards_intact(arguments[0])
        again = differentiate(block, arguments, grad)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), "differs from run to run"

    def test_forward_that_keeps_the_normalised_convolution(self, case, seed):
        arguments = inputs(covered(case), seed)
        if case.problem.activation == "relu":
            keep_from_zero(arguments)
        grad = torch.randn_like(arguments[0])
        poison()
        y = block_kept(*arguments)[0]
        wide = [a.double() if isinstance(a, Tensor) else a for a in arguments]
        ratio = worst_ratio(y, reference.conv_first_block(*wide), reference.conv_first_block(*arguments))
        assert ratio <= 1, f"y {ratio:.2f}x its bound"
        ours = differentiate(lambda *a: block_kept(*a)[0], arguments, grad)
        check_gradients(ours, arguments, grad)
        again = differentiate(lambda *a: block_kept(*a)[0], arguments, grad)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), "differs from run to run"


SMALL = Case(problem(5, 14, 14, 64), sample_scale=True)


@pytest.mark.parametrize("case", [SMALL, Case(convnext(3, 14, 14, 96), sample_scale=True)], ids=str)
class TestAnyCall:
    """The same gradients however the step is run."""

    def test_compiled(self, case, seed):
        arguments = inputs(covered(case), seed)
        grad = torch.randn_like(arguments[0])
        expected = differentiate(block, arguments, grad)
        compiled = torch.compile(lambda *a: block(*a), fullgraph=True)
        for a, b in zip(differentiate(compiled, arguments, grad), expected, strict=True):
            assert torch.equal(a, b)

    def test_cuda_graph(self, case, seed):
        arguments = inputs(covered(case), seed)
        grad = torch.randn_like(arguments[0])
        expected = differentiate(block, arguments, grad)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            differentiate(block, arguments, grad)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = differentiate(block, arguments, grad)
        for gradient in captured:
            gradient.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))

    def test_inside_of_an_autocast_region(self, case, seed):
        arguments = inputs(covered(case), seed)
        grad = torch.randn_like(arguments[0])
        expected = block_backward(grad, *arguments, [True] * TENSORS)
        with torch.autocast("cuda", torch.float16):
            gradients = block_backward(grad, *arguments, [True] * TENSORS)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))

    @pytest.mark.parametrize("wanted", [[0], [1, 2], [5, 7], [3, 4, 9], [10]])
    def test_some_gradients_alone(self, case, wanted, seed):
        arguments = inputs(covered(case), seed)
        grad = torch.randn_like(arguments[0])
        everything = block_backward(grad, *arguments, [True] * TENSORS)
        some = block_backward(grad, *arguments, [i in wanted for i in range(TENSORS)])
        assert [g.numel() > 0 for g in some] == [i in wanted for i in range(TENSORS)]
        assert all(torch.equal(some[i], everything[i]) for i in wanted)

    def test_opcheck(self, case, seed):
        arguments = inputs(covered(case), seed)
        torch.library.opcheck(block_backward.default, (torch.randn_like(arguments[0]), *arguments, [True] * TENSORS))

    def test_autocast_with_parameters_in_float32(self, case, seed):
        """Gradients reach float32 parameters in their own layout; only x and packed weights are kept for backward."""
        p = covered(case).problem
        tensors = [a.float() if isinstance(a, Tensor) else a for a in inputs(case, seed)[:TENSORS]]
        tensors[1] = reference.unpack_conv_weight(tensors[1])
        leaves = [None if a is None else a.detach().clone().requires_grad_() for a in tensors[:10]]
        kept = {}

        def pack(tensor):
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        options = {"activation": p.activation, "eps": 1e-6, "has_norm": p.has_norm, "kernels": "required"}
        with (
            torch.autocast("cuda", getattr(torch, p.dtype)),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            y = ck.conv_first_block(*leaves, tensors[10], **options)
        weights = sum(4 * a.numel() for a in leaves[1:] if a is not None)
        assert sum(kept.values()) <= 2 * 2 * leaves[0].numel() + weights
        gradients = torch.autograd.grad(y.float().square().sum(), [a for a in leaves if a is not None])
        assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in gradients)


def test_conv_weight_gradient_opcheck(seed):
    da, x = image(2, 32, 9, 7, "float16", seed), image(2, 32, 9, 7, "float16", seed + 1)
    torch.library.opcheck(conv_weight_gradient.default, (da, x, 3, 8))


def test_an_empty_batch_has_zero_gradients():
    x = torch.empty(0, 64, 5, 5, device="cuda", dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    d_weight, d_bias = conv_weight_gradient(x, x, 3, 8)
    assert d_weight.shape == (9, 64, 8) and not d_weight.any() and not d_bias.any()
