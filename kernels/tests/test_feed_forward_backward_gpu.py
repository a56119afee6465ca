"""Gradients of the feed-forward half against float64 on a GPU: the Hopper kernels and the chunked route."""

import pytest
import torch
from feed_forward_cases import GRADIENTS, FeedForwardCase, cases, inputs, widened, worst_ratio

from convfirst_kernels import feed_forward_backward
from convfirst_kernels.feed_forward_backward import reference

pytestmark = pytest.mark.gpu
op = torch.ops.convfirst.feed_forward_backward

# Widths of the chunked route, and a batch of which every block of the Hopper kernels has many tiles.
WIDE = [
    FeedForwardCase(3, 7, 7, 512, 2048, "bfloat16", "silu", layer_scale=1e-6),
    FeedForwardCase(2, 14, 14, 384, 1536, "float16", "gelu", layer_scale=1e-6, sample_scale=True),
    FeedForwardCase(1, 7, 7, 768, 3072, "bfloat16", "relu", norm=False, biases=False, layer_scale=0.0),
    FeedForwardCase(40, 14, 14, 512, 2048, "bfloat16", "silu", sample_scale=True),
]
LONG = [
    FeedForwardCase(64, 56, 56, 64, 256, "bfloat16", "silu", sample_scale=True),
    FeedForwardCase(32, 28, 28, 192, 768, "float16", "gelu", layer_scale=1e-6),
    FeedForwardCase(64, 14, 14, 256, 1024, "bfloat16", "silu", layer_scale=0.0),
]


def poison(results: tuple) -> None:
    """Leaves NaN in the memory that the next results and workspaces get."""
    torch.full((1 << 26,), float("nan"), device="cuda")
    for result in results:
        torch.full_like(result, float("nan"))


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_many_chunks(case, seed, monkeypatch):
    monkeypatch.setattr(feed_forward_backward, "CHUNK_BYTES", 1 << 20)
    test_gradients(case, seed)


@pytest.mark.parametrize("case", cases() + WIDE + LONG, ids=str)
def test_gradients(case, seed):
    if torch.cuda.get_device_capability() != (9, 0) and case in LONG:
        pytest.skip("the chunked route is tested by other cases")
    draws = []
    for number in range(case.draws):
        arguments = inputs(case, seed + number)
        poison(())
        results = op(*arguments)
        poison(results)
        for name, result, other in zip(GRADIENTS, results, op(*arguments), strict=True):
            assert torch.equal(result, other), f"{name} differs from run to run"
        draws.append((results, reference(*widened(arguments)), reference(*arguments)))
    for i, name in enumerate(GRADIENTS):
        results, truths, peers = zip(*((ours[i], truth[i], peer[i]) for ours, truth, peer in draws), strict=True)
        assert results[0].shape == truths[0].shape, name
        if results[0].numel() == 0:
            continue
        ratio = worst_ratio(zip(results, truths, peers, strict=True))
        assert ratio <= 1, f"{name}: error {ratio:.2f}x its bound (seed {seed})"


def test_dropped_samples_have_no_gradient(seed):
    arguments = list(inputs(FeedForwardCase(3, 5, 5, 128, 512, sample_scale=True), seed))
    arguments[8] = torch.zeros(3, device="cuda")
    assert all(not result.any() for result in op(*arguments))


def test_empty_batch_on_a_gpu():
    da, *gradients = op(*inputs(FeedForwardCase(0, 4, 4, 64, 256), 0))
    assert da.shape == (0, 64)
    assert all(not g.any() for g in gradients)


def test_opcheck_on_a_gpu(seed):
    case = FeedForwardCase(2, 9, 9, 64, 256, sample_scale=True)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.default, inputs(case, seed), test_utils=tests)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="the Hopper kernels alone refuse",
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: lambda t: t.contiguous()}, "a of shape"),
        ({1: lambda t: t[:, :, 1:].contiguous(memory_format=torch.channels_last)}, "dy has shape"),
        ({3: lambda t: t.float()}, "expand_weight is torch.float32"),
        ({4: lambda t: t.half()}, "expand_bias is torch.float16"),
    ],
)
def test_refusals(change, message):
    arguments = list(inputs(FeedForwardCase(2, 9, 9, 64, 256), 0))
    for index, function in change.items():
        arguments[index] = function(arguments[index])
    with pytest.raises(RuntimeError, match=message):
        op(*arguments)
