"""Blocks with batch norms in training mode, as stages that store no hidden tensor."""

import copy

import pytest
import torch
from torch import nn

import convfirst_kernels as ck
from convfirst_kernels import batch_norms
from convfirst_kernels.blocks import read_block

models = pytest.importorskip("convfirst.models")
operators = torch.ops.convfirst


def build(
    channels: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu", **options
) -> nn.Module:
    """A block in training mode whose norms and biases are no identities."""
    torch.manual_seed(seed)
    block = models.ConvFirstBlock(channels, **{"norm": "batchnorm", "layer_scale": 0.5, **options})
    for norm in (block.norm, block.expand_norm, block.project_norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.3)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return block.train().to(device, dtype, memory_format=torch.channels_last)


def images(n: int, channels: int, h: int, w: int, seed: int, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(n, channels, h, w, dtype=torch.float64, generator=generator, device=device)
    return (x + torch.linspace(-1, 1, channels, dtype=torch.float64, device=device)[:, None, None]).to(
        memory_format=torch.channels_last
    )


def step(block: nn.Module, x: torch.Tensor, grad: torch.Tensor, run=None) -> dict[str, torch.Tensor]:
    """Result, gradients and statistics of one pass."""
    x = x.detach().requires_grad_()
    y = (run or block)(x)
    y.backward(grad.to(y.dtype))
    gradients = {f"d_{name}": parameter.grad for name, parameter in block.named_parameters()}
    return {"y": y.detach(), "d_x": x.grad, **gradients, **dict(block.named_buffers())}


def staged(block: nn.Module):
    return lambda x: batch_norms.forward(read_block(block), x, None)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer_scale": None, "activation": "relu"},
        {"kernel_size": 5, "group_width": 16, "activation": "gelu", "expansion": 6},
    ],
    ids=str,
)
def test_it_is_the_block(options, seed):
    block = build(32, seed=seed, **options)
    x, grad = images(3, 32, 5, 7, seed + 1), images(3, 32, 5, 7, seed + 2)
    expected = step(copy.deepcopy(block), x, grad)
    found = step(block, x, grad, staged(block))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=lambda said, key=key: f"{key}: {said}")


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3])
def test_running_statistics_move_as_pytorchs(momentum, seed):
    block = build(32, seed=seed)
    for norm in (block.norm, block.expand_norm, block.project_norm):
        norm.momentum = momentum
    plain = copy.deepcopy(block)
    for number in range(3):
        x = images(2, 32, 4, 4, seed + number)
        with torch.no_grad():
            torch.testing.assert_close(batch_norms.forward(read_block(block), x, None), plain(x))
    for name, value in plain.named_buffers():
        torch.testing.assert_close(dict(block.named_buffers())[name], value, rtol=1e-9, atol=1e-9)


def test_a_frozen_norm_keeps_its_statistics(seed):
    block = build(32, seed=seed)
    block.expand_norm.eval()
    plain, x, grad = copy.deepcopy(block), images(2, 32, 4, 4, seed), images(2, 32, 4, 4, seed + 1)
    expected, found = step(plain, x, grad), step(block, x, grad, staged(block))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)  # folding is in float32


def test_drop_path_scales_samples(seed):
    block, x = build(32, seed=seed), images(3, 32, 4, 4, seed)
    scale = torch.tensor([0.0, 2.0, 1.0])
    with torch.no_grad():
        whole = batch_norms.forward(read_block(copy.deepcopy(block)), x, None) - x
        some = batch_norms.forward(read_block(block), x, scale) - x
    torch.testing.assert_close(some, whole * scale[:, None, None, None].double(), rtol=1e-9, atol=1e-9)


def test_synchronised_norms_run_the_blocks_own_code():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(build(32, torch.float32))
    report = str(ck.accelerate(nn.Sequential(block), kernels="reference"))
    assert "now its own PyTorch code: SyncBatchNorm in training mode needs the statistics of all processes" in report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, seed):
    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size)

    torch.manual_seed(seed)
    x = normal(2, 32, 4, 5).to(dtype, memory_format=torch.channels_last)
    conv, expand, project = normal(9, 32, 8).to(dtype), normal(64, 32).to(dtype), normal(32, 64).to(dtype)
    calls = [
        (operators.block_conv, (x, conv, normal(32), 8)),
        (operators.pixel_moments, (x,)),
        (operators.hidden_layers, (x, expand, normal(64), project, normal(32), 3, 8, "silu")),
    ]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    for operator, arguments in calls:
        leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(operator.default, tuple(leaves), test_utils=tests)
        x.requires_grad_(False)
    backwards = [
        (operators.pixel_moments_backward, (*operators.pixel_moments(x), torch.randn(32), x)),
        (operators.block_conv_backward, (torch.randn_like(x), x, conv.detach(), 8)),
    ]
    for operator, arguments in backwards:
        torch.library.opcheck(operator.default, arguments, test_utils=tests[:2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((8, 64, 14, 14), {}),
        ((6, 128, 13, 9), {"activation": "gelu"}),
        ((4, 256, 7, 7), {"activation": "relu", "layer_scale": None}),
        ((12, 512, 7, 7), {"expansion": 6}),
        ((3, 96, 11, 5), {"kernel_size": 5, "group_width": 16}),
    ],
    ids=str,
)
def test_error_against_float64(size, options, dtype, seed):
    """At most twice that of PyTorch's own block under autocast, plus two quanta; the worst of four draws of each.

    Quanta are of a tensor's largest value. The first norm's bias has a gradient of zero, since the next norm takes out
    what is added to all pixels: there they are of the largest term of the sum that cancels.
    """
    errors: dict[str, list[tuple[float, float, float]]] = {}
    for draw in range(seed, seed + 4):
        exact = build(size[1], seed=draw, device="cuda", **options)
        plain = copy.deepcopy(exact).float()
        fused = copy.deepcopy(plain)
        ck.accelerate(nn.Sequential(fused), kernels="required")
        again = copy.deepcopy(fused)
        terms: dict[str, torch.Tensor] = {}
        exact.norm.register_full_backward_hook(lambda _, d_x, d_y, terms=terms: terms.update({"d_norm.bias": d_y[0]}))
        x, grad = (images(*size, draw + number, "cuda").to(dtype) for number in (4, 8))
        truth = step(exact, x.double(), grad)
        peer, ours, repeated = (step(block, x, grad, autocast(block, dtype)) for block in (plain, fused, again))
        for key, value in truth.items():
            error, theirs = (float((found[key].double() - value).abs().max()) for found in (ours, peer))
            errors.setdefault(key, []).append((error, theirs, float(terms.get(key, value).abs().max())))
        assert torch.equal(repeated["y"], ours["y"]) and torch.equal(repeated["d_x"], ours["d_x"])
    for key, draws in errors.items():
        error, theirs, scale = map(max, zip(*draws, strict=True))
        bound = 2 * theirs + 2 * torch.finfo(dtype).eps * scale
        assert error <= bound, f"{key}: error {error:.3g}, PyTorch's {theirs:.3g}, bound {bound:.3g}"


def autocast(block: nn.Module, dtype: torch.dtype):
    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", dtype):
            return block(x)

    return run


@pytest.mark.gpu
def test_a_compiled_step(seed):
    block = build(64, torch.float32, seed, "cuda")
    ck.accelerate(nn.Sequential(block), kernels="required")
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True)
    x, grad = (images(4, 64, 14, 14, seed + number, "cuda").bfloat16() for number in (1, 2))
    expected, found = (step(run, x, grad, autocast(run, torch.bfloat16)) for run in (block, compiled))
    for (key, value), ours in zip(expected.items(), found.values(), strict=True):
        if key != "d_norm.bias":  # zero but for roundings: the next norm takes out what is added to all pixels
            torch.testing.assert_close(ours, value, rtol=0.05, atol=0.02 * float(value.abs().max()), msg=key)
