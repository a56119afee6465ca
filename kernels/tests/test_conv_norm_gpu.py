"""conv_norm on a GPU, against float64 and PyTorch's own 16-bit path."""

import pytest
import torch
from cases import draws_of, tile_max, worst_ratio_of
from torch import Tensor

from convfirst_kernels import (
    conv_norm,  # noqa: F401  registers the operator
    pack_conv_weight,
    reference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="needs compute capability 9.0",
    ),
]
SHAPES = [  # batch, height, width, channels, filter side, group width
    (1, 1, 1, 64, 3, 8), (3, 7, 7, 512, 3, 8), (2, 13, 17, 256, 3, 8), (5, 56, 56, 64, 3, 8), (2, 225, 193, 32, 3, 8),
    (1, 1, 29, 128, 5, 16), (2, 14, 14, 1024, 3, 16), (3, 9, 11, 96, 5, 8), (128, 14, 14, 256, 3, 8),
    (1, 1, 1, 40, 7, 1), (3, 7, 7, 768, 7, 1), (2, 13, 17, 192, 7, 1), (5, 56, 56, 96, 7, 1), (2, 14, 14, 1536, 7, 1),
    (1, 225, 193, 48, 7, 1), (64, 14, 14, 384, 7, 1),
    (128, 14, 14, 384, 7, 1), (128, 14, 14, 320, 7, 1), (128, 7, 7, 768, 7, 1), (2, 7, 7, 64, 7, 1),  # an image a block
]  # fmt: skip


def inputs(shape: tuple, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, height, width, channels, side, group_width = shape
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device="cuda")

    x = draw(batch, channels, height, width).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = pack_conv_weight(draw(channels, group_width, side, side) / (side * group_width**0.5), dtype)
    return x, weight, draw(channels)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, group_width: int) -> Tensor:
    """PyTorch's own operators in x's dtype."""
    a = reference.conv(x, weight, bias, group_width)
    if residual is not None:
        return a + residual
    return torch.nn.functional.layer_norm(a.permute(0, 2, 3, 1), a.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)


def draws(shape: tuple) -> range:
    """Numbers of draws: of one pixel, the error of its one deviation may be a tenth of PyTorch's or ten times it."""
    batch, height, width = shape[:3]
    return range(draws_of(batch * height * width, wanted=64))


def rstd_errors(rstd: Tensor, x: Tensor, weight: Tensor, bias: Tensor, group_width: int) -> Tensor:
    """Largest relative errors of the reciprocal deviations, ours and PyTorch's of its convolution in x's dtype."""
    expected = (reference.conv(x.double(), weight.double(), bias, group_width).var(1, correction=0) + 1e-6).rsqrt()
    rows = reference.conv(x, weight, bias, group_width).permute(0, 2, 3, 1).contiguous()
    _, _, peer = torch.native_layer_norm(rows, rows.shape[-1:], None, None, 1e-6)
    return torch.stack([(y.flatten() / expected.flatten() - 1).abs().max() for y in (rstd, peer)])


def poison(like: Tensor) -> None:
    """Leave NaN where the next allocations of this size will lie."""
    blocks = [torch.full_like(like, float("nan")) for _ in range(2)]
    blocks.append(torch.full((like.numel() // like.shape[1],), float("nan"), device=like.device))
    del blocks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestError:
    def test_normalised(self, shape, dtype, seed):
        images, errors = [], []
        for number in draws(shape):
            x, weight, bias = inputs(shape, dtype, seed + number)
            call = (x, weight, bias, None, shape[-1], True, 1e-6)
            poison(x)
            a, rstd = torch.ops.convfirst.conv_norm(*call)
            again = torch.ops.convfirst.conv_norm(*call)
            assert torch.equal(again[0], a) and torch.equal(again[1], rstd)
            truth = plain(x.double(), weight.double(), bias, None, shape[-1])
            images.append((a, truth, plain(x, weight, bias, None, shape[-1])))
            errors.append(rstd_errors(rstd, x, weight, bias, shape[-1]))
        assert worst_ratio_of(images, tile_max) <= 1
        error, peer_error = torch.stack(errors).amax(0)
        assert error <= 2 * peer_error + 1e-6

    def test_with_a_residual(self, shape, dtype, seed):
        images = []
        for number in draws(shape):
            x, weight, _ = inputs(shape, dtype, seed + number)
            residual = torch.randn_like(x)
            call = (x, weight, None, residual, shape[-1], False, 0.0)
            poison(x)
            a, rstd = torch.ops.convfirst.conv_norm(*call)
            truth = plain(x.double(), weight.double(), None, residual.double(), shape[-1])
            assert rstd.numel() == 0
            assert torch.equal(torch.ops.convfirst.conv_norm(*call)[0], a)
            images.append((a, truth, plain(x, weight, None, residual, shape[-1])))
        assert worst_ratio_of(images, tile_max) <= 1


def test_graph_and_empty_batch(seed):
    x, weight, bias = inputs((2, 9, 9, 64, 3, 8), torch.bfloat16, seed)
    expected = torch.ops.convfirst.conv_norm(x, weight, bias, None, 8, True, 1e-6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.convfirst.conv_norm(x, weight, bias, None, 8, True, 1e-6)
    for tensor in captured:
        tensor.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    a, rstd = torch.ops.convfirst.conv_norm(x[:0], weight, bias, None, 8, True, 1e-6)
    assert a.shape == (0, 64, 9, 9) and rstd.shape == (0,)


def test_what_no_kernel_covers_is_refused(seed):
    x, weight, bias = inputs((1, 5, 5, 40, 3, 8), torch.float16, seed)
    with pytest.raises(RuntimeError, match="conv_norm: no kernel covers 3x3 filters on 40 channels in groups of 8"):
        torch.ops.convfirst.conv_norm(x, weight, bias, None, 8, True, 1e-6)
