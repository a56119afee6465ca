"""Stems and downsampling layers on a CPU: definitions, packing, operators, refusals, swapping."""

import copy
import json
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from cases import worst_ratio
from patch_cases import Patch, module, multiply, parts_of, patch_inputs
from torch import nn

import convfirst_kernels as ck
from convfirst_kernels import outside, patches
from convfirst_kernels.acceleration import OutsideForward
from convfirst_kernels.blocks import Unsupported

timm = pytest.importorskip("timm")
operators = torch.ops.convfirst
CASES = [
    Patch("stem", 32, 2, 9, 14, "float16"),
    Patch("stem", 64, 1, 8, 5, "float16", "batchnorm", "gelu", "contiguous"),
    Patch("patch_stem", 48, 2, 9, 14, "float16"),
    Patch("patch_stem", 64, 1, 8, 5, "float16", "batchnorm", layout="contiguous"),
    Patch("downsample", 32, 2, 5, 6, "float16"),
    Patch("downsample", 24, 1, 4, 9, "float16", "batchnorm"),
]


def operator_arguments(case: Patch) -> tuple:
    """x in float32 and the packed weights, those that the operator takes."""
    x, network = patch_inputs(case, 1, device="cpu").float(), module(case, 2).float()
    packed = outside.read_outside(network).pack(torch.float32)
    return x, *(packed[:2] + packed[3:5] if case.kind == "downsample" else packed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_weights_compute_the_module(case):
    x, network = patch_inputs(case, 1, device="cpu").double(), module(case, 2)
    parts = outside.read_outside(network)
    result = parts.launch(x, parts.pack(torch.float64))
    torch.testing.assert_close(result, network(x), rtol=1e-5, atol=1e-5)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case):
    arguments = operator_arguments(case)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(operators, case.kind).default, arguments, test_utils=checks)
    if case.kind == "downsample":
        x, *_, eps, has_norm = arguments
        torch.library.opcheck(operators.normalised_patches.default, (x, eps, has_norm), test_utils=checks)


@pytest.mark.parametrize("case", CASES[-2:], ids=str)
def test_one_product_computes_the_layer(case):
    x, network = patch_inputs(case, 1, device="cpu").float(), module(case, 2).float()
    parts = outside.read_outside(network)
    weight, bias, _, eps, has_norm, vectors = parts.pack(torch.float32)
    expected = torch.cat([bias, *(weight[:, t * case.channels : (t + 1) * case.channels].sum(1) for t in range(4))])
    torch.testing.assert_close(vectors, expected)
    torch.testing.assert_close(multiply(parts, parts.pack(torch.float32), x), network(x), rtol=1e-4, atol=1e-4)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = x, weight, vectors, eps, has_norm
    torch.library.opcheck(operators.downsample_gemm.default, arguments, test_utils=checks)


def arithmetic(x: torch.Tensor, packed: tuple) -> torch.Tensor:
    """What csrc/patch/downsample_gemm_fwd_sm90_wgmma.cuh rounds and in which order, but for the order within sums."""
    weight, _, _, eps, has_norm, vectors = packed
    n, channels, height, width = x.shape
    y = torch.zeros(n * (height // 2) * (width // 2), weight.shape[0])
    for tap in range(4):
        rows = x[:, :, tap // 2 : height // 2 * 2 : 2, tap % 2 : width // 2 * 2 : 2].permute(0, 2, 3, 1)
        rows = rows.reshape(-1, channels).float()
        product = rows @ weight[:, tap * channels : (tap + 1) * channels].float().t()
        mean, inverse = 0.0, 1.0
        if has_norm:
            off = rows - rows[:, :1]
            moment = off.mean(1, keepdim=True)
            mean = rows[:, :1] + moment
            inverse = torch.rsqrt((off.square().mean(1, keepdim=True) - moment.square()).clamp(min=0) + eps)
        y += inverse * (product - mean * vectors.view(5, -1)[1 + tap])
    y = (y + vectors.view(5, -1)[0]).to(x.dtype)
    return y.view(n, height // 2, width // 2, -1).permute(0, 3, 1, 2)


@torch.no_grad()
@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("mean", [0.0, 0.3, -5.0, 100.0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("channels", [128, 384])
def test_the_norm_out_of_the_product_keeps_the_bound(channels, dtype, mean, outlier, seed):
    case = Patch("downsample", channels, 4, 14, 14, dtype, mean=mean)
    x, network = patch_inputs(case, seed, device="cpu"), module(case, seed + 1)
    if outlier:  # what the sums of squares are shifted by is far from all else
        x[:, 0] += 200
    truth = network(x.double())
    parts, packed = parts_of(network, x.dtype)
    assert worst_ratio(arithmetic(x, packed), truth, network(x)) <= 1


@pytest.mark.parametrize(
    ("pixels", "channels", "expected"),
    [
        (128 * 14 * 14, 128, {"rows": 192, "steps": 8, "grid": 132, "rounds": 2}),
        (128 * 7 * 7, 256, {"rows": 192, "steps": 16, "grid": 132, "rounds": 1}),
        (128 * 14 * 14, 192, {"rows": 128, "columns": 192, "steps": 12, "grid": 132, "rounds": 3}),
        (128 * 7 * 7, 384, {"rows": 128, "columns": 192, "steps": 24, "grid": 132, "rounds": 2}),
        (8 * 7 * 7, 256, {"rows": 64, "steps": 16, "grid": 28, "rounds": 1}),
        (1, 64, {"rows": 64, "steps": 4, "grid": 1, "rounds": 1}),
    ],
)
def test_tiles_of_one_product(pixels, channels, expected):
    plan = json.loads(operators.plan_downsample_gemm(pixels, channels, 2 * channels, 132))
    assert {key: plan[key] for key in expected} == expected and plan["shared_memory"] <= 232448
    assert operators.plan_downsample_gemm(pixels, channels + 8, 256, 132) == ""


HOPPER = 90, 232448
LAYERS = [  # channels, rows of the result, which of the three computes it on Hopper
    (64, 128 * 28 * 28, "multiplied"),
    (64, 8 * 28 * 28, "multiplied"),
    (64, 28 * 28, "gathered"),
    (128, 128 * 14 * 14, "multiplied"),
    (256, 8 * 7 * 7, "gathered"),
    (32, 128 * 28 * 28, "fused"),
    (32, 28 * 28, "gathered"),
    (96, 128 * 28 * 28, "fused"),
    (384, 128 * 7 * 7, "gathered"),
]


@pytest.mark.parametrize(("channels", "rows", "expected"), LAYERS)
def test_what_computes_a_downsampling_layer(channels, rows, expected, monkeypatch):
    monkeypatch.setattr(outside, "_uncovered", lambda *shape: operators.patch_refusal(*shape[:3], *HOPPER))
    parts = outside.read_outside(module(Patch("downsample", channels, 1, 2, 2), 1))
    x = SimpleNamespace(device=torch.device("cuda", 0), shape=(rows, channels, 2, 2))
    found = "multiplied" if parts.multiplied(x) else "fused" if parts.fused(x) else "gathered"
    assert found == expected


def head_of(channels: int, classes: int, **more) -> nn.Module:
    head = timm.layers.NormMlpClassifierHead(channels, classes, **more).eval().requires_grad_(False)
    for tensor in head.parameters():
        tensor.normal_(0, 0.2)
    return head


def test_packed_weights_compute_the_head():
    head, x = head_of(24, 10).double(), torch.randn(2, 24, 3, 5, dtype=torch.float64)
    parts = outside.read_head(head)
    packed = parts.pack(torch.float64)
    torch.testing.assert_close(parts.launch(x, packed), head(x), rtol=1e-5, atol=1e-5)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operators.head.default, (x, *packed), test_utils=checks)


def test_heads_that_the_kernel_does_not_do():
    for more, reason in (({"hidden_size": 8}, "hidden layer"), ({"pool_type": "max"}, "it pools by 'max'")):
        with pytest.raises(Unsupported, match=reason):
            outside.read_head(head_of(24, 10, **more))


@torch.no_grad()
def test_accelerates_the_head_for_few_images(images, monkeypatch):
    monkeypatch.setattr(outside, "unavailable", lambda *arguments: None)
    monkeypatch.setattr(outside, "uncovered", lambda *arguments: None)
    calls, launch = [], outside.HeadParts.launch
    monkeypatch.setattr(outside.HeadParts, "launch", lambda *arguments: calls.append(1) or launch(*arguments))
    network = build("convfirst")
    features = network.forward_features(images)
    expected = network.forward_head(features)
    report = ck.accelerate(network)
    assert [(row.name, row.swapped) for row in report.heads] == [("head", True)] and "head C=" in str(report)
    torch.testing.assert_close(network.forward_head(features), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
    network.forward_head(features, pre_logits=True)
    network.forward_head(features.repeat(outside.HEAD_IMAGES, 1, 1, 1)[: outside.HEAD_IMAGES + 1])
    network.train().forward_head(features)
    assert len(calls) == 1
    report.undo()
    assert "forward" not in network.head.__dict__


def test_centring_is_what_layer_norm_does():
    weight, bias = outside.centred(torch.randn(8, 3, 3, 3).half(), torch.randn(8).half())
    assert weight.dtype == bias.dtype == torch.float32
    assert weight.sum(0).abs().max() < 1e-5 and bias.sum().abs() < 1e-5


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.float16)


STEM = dict(
    x=half(1, 3, 8, 8), conv1_weight=half(16, 32), norm1_weight=torch.ones(16), norm1_bias=torch.zeros(16),
    conv2_weight=half(32, 9, 16), conv2_bias=torch.zeros(32), norm2_weight=torch.ones(32), norm2_bias=torch.zeros(32),
    activation="silu", eps1=1e-6, eps2=1e-6, has_norm=True,
)  # fmt: skip
PATCH_STEM = dict(
    x=half(1, 3, 8, 8), weight=half(64, 48), bias=torch.zeros(64), norm_weight=torch.ones(64),
    norm_bias=torch.zeros(64), eps=1e-6, has_norm=True,
)  # fmt: skip
DOWNSAMPLE = dict(
    x=half(1, 32, 4, 4).contiguous(memory_format=torch.channels_last), weight=half(64, 128), bias=torch.zeros(64),
    eps=1e-6, has_norm=True,
)  # fmt: skip
DOWNSAMPLE_GEMM = dict(
    x=half(1, 64, 4, 4).contiguous(memory_format=torch.channels_last), weight=half(128, 256), vectors=torch.zeros(640),
    eps=1e-6, has_norm=True,
)  # fmt: skip
# fmt: off
REFUSALS = [
    ("stem", STEM, {"x": half(1, 4, 8, 8)}, "x has shape [1, 4, 8, 8]; expected [batch, 3, height, width]"),
    ("stem", STEM, {"x": torch.zeros(1, 3, 8, 8)},
     "x is torch.float32; supported are torch.float16 and torch.bfloat16"),
    ("stem", STEM, {"conv1_weight": half(16, 27)}, "conv1_weight has shape [16, 27]; expected [16, 32]"),
    ("stem", STEM, {"conv2_weight": half(32, 9, 32)}, "conv2_weight has shape [32, 9, 32]; expected [32, 9, 16]"),
    ("stem", STEM, {"norm1_bias": half(16)}, "norm1_bias is torch.float16; expected torch.float32"),
    ("stem", STEM, {"activation": "elu"}, "activation is 'elu'; supported are 'relu', 'silu' and 'gelu'"),
    ("patch_stem", PATCH_STEM, {"x": half(1, 3, 3, 8)},
     "x has shape [1, 3, 3, 8]; height and width must be at least 4"),
    ("patch_stem", PATCH_STEM, {"weight": half(64, 49)}, "weight has shape [64, 49]; expected [*, 48]"),
    ("patch_stem", PATCH_STEM, {"bias": torch.zeros(48)}, "bias has shape [48]; expected [64] = [channels]"),
    ("downsample", DOWNSAMPLE, {"x": half(1, 32, 4, 4)}, "x of shape [1, 32, 4, 4] has strides [512, 16, 4, 1]"),
    ("downsample", DOWNSAMPLE, {"x": half(1, 1, 4, 32).permute(0, 3, 1, 2)},
     "x has shape [1, 32, 1, 4]; height and width must be at least 2"),
    ("downsample", DOWNSAMPLE, {"weight": half(64, 64)}, "weight has shape [64, 64]; expected [*, 128]"),
    ("downsample_gemm", DOWNSAMPLE_GEMM, {"weight": half(128, 64)}, "weight has shape [128, 64]; expected [*, 256]"),
    ("downsample_gemm", DOWNSAMPLE_GEMM, {"vectors": torch.zeros(128)},
     "vectors has shape [128]; expected [640] = [(1 + taps) x columns]"),
    ("downsample_gemm", DOWNSAMPLE_GEMM, {"tile": 5}, "tile is 5; supported are 1 to 4"),
    ("downsample_gemm", DOWNSAMPLE_GEMM, {"tile": 4}, "tile 4 has 192 columns; weight has 128, which is no multiple"),
]
# fmt: on


@pytest.mark.parametrize(("operator", "given", "change", "message"), REFUSALS)
def test_refuses(operator, given, change, message):
    check = getattr(operators, f"{operator}_check")
    assert check(**given).startswith(f"{operator} C=")
    with pytest.raises(RuntimeError, match=f"^{operator}: {re.escape(message)}"):
        check(**given | change)


def test_uncovered_says_what_is():
    with pytest.raises(RuntimeError, match="op is 'pool'; known are 'stem'"):
        operators.patch_refusal("pool", 3, 64, 90, 232448)
    assert "no such kernels for compute capability 75" in operators.patch_refusal("stem", 3, 64, 75, 65536)
    assert operators.patch_refusal("downsample", 64, 128, 90, 232448) == ""
    assert operators.patch_refusal("downsample", 96, 192, 90, 232448) == ""
    assert "from 128 to 256 channels" in operators.patch_refusal("downsample", 128, 256, 90, 232448)


def test_kernels_that_have_not_run_on_a_gpu_are_asked_for_by_name():
    assert "force_path('sm80') asks for them" in operators.patch_refusal("stem", 3, 64, 80, 166912)
    with ck.force_path("sm80"):
        assert operators.patch_refusal("stem", 3, 64, 80, 166912) == ""


def test_what_one_product_does_not_do():
    shape = 128, 256, 90, 232448
    assert operators.patch_refusal("downsample_gemm", *shape) == ""
    assert "from 40 to 80 channels" in operators.patch_refusal("downsample_gemm", 40, 80, 90, 232448)
    assert "bytes of shared memory" in operators.patch_refusal("downsample_gemm", 128, 256, 90, 101376)
    with ck.force_path("sm80"):
        assert "no such kernel" in operators.patch_refusal("downsample_gemm", *shape)


NETWORKS = {
    "convfirst": ("convfirst_atto", {}, ["stem"] + [f"stages.{i}.downsample" for i in (1, 2, 3)]),
    "convfirst-batchnorm": ("convfirst_atto", {"norm": "batchnorm"}, ["stem", "stages.1.downsample"]),
    "convnext": (
        "convnext_atto",
        {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 128)},
        ["stem"] + [f"stages.{i}.downsample" for i in (1, 2, 3)],
    ),
}


def build(name: str, **more) -> nn.Module:
    pytest.importorskip("convfirst.models")
    torch.manual_seed(0)
    model, options, _ = NETWORKS[name]
    network = timm.create_model(model, num_classes=7, **options, **more).eval()
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, (nn.LayerNorm, nn.BatchNorm2d)):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(0, 0.3)
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 2)
    return network.to(memory_format=torch.channels_last)


@pytest.fixture(params=NETWORKS)
def network(request):
    return build(request.param)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def covered(monkeypatch):
    """As on a GPU that has a kernel for all of it; the operators' CPU path computes it. Counts the calls."""
    calls = []
    monkeypatch.setattr(outside, "unavailable", lambda *arguments: None)
    monkeypatch.setattr(outside, "uncovered", lambda *arguments: None)
    for parts in (outside.StemParts, outside.PatchStemParts, outside.DownsampleParts):
        launch = parts.launch
        monkeypatch.setattr(parts, "launch", lambda *a, launch=launch: (calls.append(1), launch(*a))[1])
    return calls


@torch.no_grad()
def test_same_result_and_undo(network, images, covered):
    expected, before = network(images), network.state_dict()
    report = ck.accelerate(network)
    assert [row.swapped for row in report.outside] == [True] * 4
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert len(covered) == 4 and list(network.state_dict()) == list(before)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(other(images), expected, rtol=1e-4, atol=1e-5)
    assert len(covered) == 12
    report.undo()
    assert torch.equal(network(images), expected) and len(covered) == 12
    assert not any("forward" in m.__dict__ for m in network.modules())


def test_report_lists_them_and_off_takes_them_away(network):
    report = ck.accelerate(network)
    assert {row.name for row in report.outside} == {"stem", *(f"stages.{i}.downsample" for i in (1, 2, 3))}
    assert "stages.2.downsample" in str(report) and "downsampling C=64 to 128" in str(report)
    ck.accelerate(network, kernels="off")
    assert not any("forward" in m.__dict__ for m in network.modules())


def test_gradients_come_from_the_layers_own_code(images, covered):
    network = build("convfirst")
    ck.accelerate(network)
    network(images).sum().backward()
    assert not covered and network.stem.conv1.weight.grad is not None
    network.requires_grad_(False)
    network(images.requires_grad_()).sum().backward()
    assert images.grad is not None and not covered[3:]


@torch.no_grad()
def test_repacks_when_weights_change(network, images, covered):
    ck.accelerate(network)
    network(images)
    for parameter in network.stem.parameters():
        parameter.mul_(1.3)
    accelerated = network(images)
    ck.accelerate(network, kernels="off")
    torch.testing.assert_close(accelerated, network(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_batch_norm_in_training_runs_the_layers_own_code(images, covered):
    network = build("convfirst-batchnorm").train()
    ck.accelerate(network)
    mean = network.stem.norm1.running_mean.clone()
    network(images)
    assert not covered and not torch.equal(network.stem.norm1.running_mean, mean)


def test_says_why_not():
    options = {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 128)}
    for more, place, reason in (
        ({"stem_type": "overlap"}, "stem", "it consists of Conv2d, Conv2d, LayerNorm2d"),
        ({"in_chans": 1}, "stem", "its images have 1 channels; supported are 3"),
        ({"patch_size": 2}, "stem", "kernel size (2, 2), stride (2, 2)"),
        ({"output_stride": 16}, "stages.3.downsample", "supported is 2x2 with stride 2"),
    ):
        report = ck.accelerate(timm.create_model("convnext_atto", **options, **more))
        (row,) = (row for row in report.outside if row.name == place)
        assert not row.swapped and reason in row.detail, row.detail
    model = build("convfirst")
    model.stem.norm1.register_forward_hook(lambda *_: None)
    row = ck.accelerate(model).outside[0]
    assert row.name == "stem" and "norm1 has forward hooks" in row.detail


@torch.no_grad()
@pytest.mark.parametrize("frozen", [True, False])
def test_compiles_without_graph_break(frozen, images, monkeypatch):
    monkeypatch.setattr(outside, "unavailable", lambda *arguments: None)
    monkeypatch.setattr(outside, "uncovered", lambda *arguments: None)
    network = build("convfirst", depths=(1, 1, 1, 1))
    expected = network(images)
    ck.accelerate(network, frozen=frozen)
    network(images)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)


def test_frozen_forward_keeps_its_packing(images, covered):
    network = build("convnext")
    with torch.no_grad():
        ck.accelerate(network, frozen=True)
        network(images)
        stand_in = network.stem.forward
        packed = stand_in.packed
        network(images)
    assert isinstance(stand_in, OutsideForward) and stand_in.packed is packed


def test_definition_of_the_norm():
    v = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    v = v - v.mean(1, keepdim=True)
    weight, bias = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    expected = nn.functional.layer_norm(v.permute(0, 2, 3, 1), (8,), weight, bias, 1e-3).permute(0, 3, 1, 2)
    torch.testing.assert_close(patches._norm(v, weight, bias, 1e-3, True), expected)
