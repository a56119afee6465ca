"""Swapping blocks of ConvFirst and ConvNeXt on a CPU, where the operator runs its reference."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import convfirst_kernels as ck
from convfirst_kernels.acceleration import FusedForward
from convfirst_kernels.block import pack_conv_weight, run_block
from convfirst_kernels.blocks import Parts, fold, read_block

timm = pytest.importorskip("timm")

NETWORKS = {
    "convfirst": ("convfirst_atto", {"drop_path_rate": 0.5}),
    "convfirst-batchnorm": ("convfirst_atto", {"norm": "batchnorm"}),
    "convfirst-bare": (
        "convfirst_atto",
        {"ls_init_value": None, "activation": "relu", "kernel_size": 5, "group_width": 16},
    ),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 128)}),
    "convnext-conv-mlp": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 128), "conv_mlp": True}),
}
BLOCKS = {"convfirst": 5, "convnext": 4}


def build(name: str, **more) -> nn.Module:
    model, options = NETWORKS[name]
    if model.startswith("convfirst"):
        pytest.importorskip("convfirst.models")
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=7, **{"ls_init_value": 0.5, **options, **more}).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
            elif isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return network.to(memory_format=torch.channels_last)


@pytest.fixture(params=NETWORKS)
def network(request):
    return build(request.param)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


@pytest.fixture
def covered(monkeypatch):
    """As on a GPU that has a kernel for everything; the operator's CPU path computes it. Counts the calls."""
    calls = []
    monkeypatch.setattr("convfirst_kernels.block.refusal", lambda *shape: None)
    monkeypatch.setattr("convfirst_kernels.backward.refusal", lambda *shape: None)
    operator = torch.ops.convfirst.conv_first_block
    monkeypatch.setattr(
        "convfirst_kernels.acceleration.launch", lambda *arguments: (calls.append(1), operator(*arguments))[1]
    )
    return calls


def test_same_result_and_undo(network, images, covered):
    with torch.no_grad():
        expected = network(images)
        report = ck.accelerate(network)
        fused = network(images)
        assert len(covered) == len(report.swapped) > 0
        assert not report.skipped
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-5)
        report.undo()
        assert torch.equal(network(images), expected)
        assert len(covered) == len(report.swapped)


def test_state_dict_is_unchanged(network, covered):
    before = network.state_dict()
    report = ck.accelerate(network)
    after = network.state_dict()
    assert list(before) == list(after)
    assert all(before[k].data_ptr() == after[k].data_ptr() for k in before)
    assert not any("forward" in name for name, _ in network.named_modules())
    report.undo()
    assert list(network.state_dict()) == list(before)


def test_copies_and_pickles(network, images, covered):
    with torch.no_grad():
        expected = network(images)
        ck.accelerate(network)
        network(images)
        buffer = io.BytesIO()
        torch.save(network, buffer)
        buffer.seek(0)
        copies = [
            copy.deepcopy(network),
            pickle.loads(pickle.dumps(network)),
            torch.load(buffer, weights_only=False),
        ]
        for other in copies:
            fused = [m.forward for m in other.modules() if isinstance(m.__dict__.get("forward"), FusedForward)]
            assert fused and all(any(f.block is m for m in other.modules()) for f in fused)
            for parameter in network.parameters():
                parameter.add_(1)
            torch.testing.assert_close(other(images), expected, rtol=1e-4, atol=1e-5)
            for parameter in network.parameters():
                parameter.sub_(1)


def test_repacks_when_weights_change(network, images, covered):
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        expected = other(images)
        ck.accelerate(network)
        first = network(images)
        assert not torch.allclose(first, expected)
        network.load_state_dict(other.state_dict())
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
        assert network(images).dtype == torch.float32
        network.double()
        torch.testing.assert_close(network(images.double()).float(), expected, rtol=1e-4, atol=1e-5)


def test_packs_once(images, covered, monkeypatch):
    network = build("convfirst")
    packs = []
    pack = Parts.pack
    monkeypatch.setattr(Parts, "pack", lambda self, *more, **named: (packs.append(1), pack(self, *more, **named))[1])
    ck.accelerate(network)
    with torch.no_grad():
        for _ in range(3):
            network(images)
    assert len(packs) == 5


@pytest.mark.parametrize(("name", "frozen"), [("convfirst-batchnorm", False), ("convnext", True)])
def test_compiles_without_graph_break(name, frozen, images, monkeypatch):
    monkeypatch.setattr("convfirst_kernels.block.refusal", lambda *shape: None)
    network = build(name, depths=(1, 1, 1, 1))
    with torch.no_grad():
        expected = network(images)
        ck.accelerate(network, frozen=frozen)
        network(images)
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)


def check_gradients(network: nn.Module, images: torch.Tensor) -> None:
    def gradients():
        network.zero_grad()
        network(images).square().sum().backward()
        return {n: p.grad for n, p in network.named_parameters()}

    plain = gradients()
    ck.accelerate(network)
    fused = gradients()
    for key, gradient in plain.items():
        torch.testing.assert_close(fused[key], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max() + 1))
        assert fused[key].stride() == gradient.stride(), key  # or DDP copies it


def test_batch_norms_in_evaluation_mode_are_trained(images, covered):
    """Gradients of every parameter, of a norm's factor of zero too."""
    network = build("convfirst-batchnorm", drop_path_rate=0.0)
    with torch.no_grad():
        network.stages[1].blocks[0].project_norm.weight[:3] = 0.0
    check_gradients(network, images)
    assert covered


@pytest.mark.parametrize("name", ["convfirst", "convfirst-bare", "convnext", "convnext-conv-mlp"])
def test_trains(name, images, covered):
    """Gradients of every parameter are those of the plain network."""
    network = build(name, drop_path_rate=0.0).train()
    check_gradients(network, images)
    assert covered


def test_batch_norm_in_training_takes_the_batchs_statistics(images, covered):
    network = build("convfirst-batchnorm").train()
    plain = copy.deepcopy(network)
    ck.accelerate(network)
    for model in (network, plain):
        model(images).sum().backward()
    assert not covered  # the block's operator folds running statistics
    for (key, ours), theirs in zip(network.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=key)
    network.eval()
    with torch.no_grad():
        network(images)
    assert len(covered) == 5


def test_drop_path_drops_samples(covered):
    network = build("convfirst").train()
    block = network.stages[-1].blocks[-1]
    ck.accelerate(network)
    x = torch.randn(400, 256, 1, 1)
    with torch.no_grad():
        branch = (block(x) - x).flatten(1).abs().amax(1)
        block.eval()
        kept = (block(x) - x).flatten(1).abs().amax(1)
    dropped = branch == 0
    assert 0.3 < dropped.float().mean() < 0.7
    torch.testing.assert_close(branch[~dropped], 2 * kept[~dropped], rtol=1e-3, atol=1e-5)


def test_weights_packed_under_inference_mode_serve_gradients_of_x(images, covered):
    network = build("convnext").requires_grad_(False)
    ck.accelerate(network)
    with torch.inference_mode():
        network(images)
    images.requires_grad_()
    network(images).sum().backward()
    assert images.grad is not None


def test_channels_first_input_is_converted(images, covered):
    network = build("convnext")
    with torch.no_grad():
        expected = network(images.contiguous())
        ck.accelerate(network)
        torch.testing.assert_close(network(images.contiguous()), expected, rtol=1e-4, atol=1e-5)


def test_data_parallel(images, covered):
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    try:
        network = build("convnext").train()
        ck.accelerate(network)
        wrapped = nn.parallel.DistributedDataParallel(network)
        wrapped(images).sum().backward()
        assert covered and all(p.grad is not None for p in network.parameters())
    finally:
        torch.distributed.destroy_process_group()


class TestReport:
    def test_lists_every_block(self, network):
        report = ck.accelerate(network)
        family = "convfirst" if len(report.rows) == 5 else "convnext"
        assert len(report.rows) == BLOCKS[family]
        assert str(report).startswith(f"{BLOCKS[family]} of {BLOCKS[family]} blocks fused (kernels='auto')")
        assert "the weights are on no GPU" in str(report)
        assert "stages.3.blocks.0" in str(report)

    def test_says_why_not(self, caplog):
        cases = [
            (timm.create_model("convnextv2_atto"), "mlp is GlobalResponseNormMlp; supported is Mlp"),
            (timm.create_model("convnext_atto", act_layer="gelu_tanh"), "activation is GELUTanh"),
            (timm.create_model("convnext_atto", kernel_sizes=9), "kernel size (9, 9); supported are 3, 5 and 7"),
            (timm.create_model("convnext_atto", dims=(20, 40, 80, 160)), "20 channels; supported are multiples of 8"),
            (timm.create_model("convnext_atto", output_stride=16), "dilation (2, 2); supported is 1"),
        ]
        for model, reason in cases:
            report = ck.accelerate(model)
            assert any(reason in row.detail for row in report.skipped), f"{reason}\n{report}"
        assert len([r for r in caplog.records if "blocks stay as they are" in r.message]) == len(cases)

    def test_partly_covered(self, images):
        model = timm.create_model("convnext_atto", dims=(20, 40, 80, 160), depths=(1, 1, 1, 1)).eval()
        report = ck.accelerate(model)
        assert (len(report.swapped), len(report.skipped)) == (3, 1)
        model(images)

    def test_hooks_keep_their_block(self):
        network = build("convnext")
        network.stages[1].blocks[0].mlp.register_forward_hook(lambda *_: None)
        (row,) = ck.accelerate(network).skipped
        assert row.name == "stages.1.blocks.0" and "mlp has forward hooks" in row.detail

    def test_required_lists_what_is_missing_and_changes_nothing(self):
        model = timm.create_model("convnext_atto", dims=(20, 40, 80, 160))
        with pytest.raises(RuntimeError, match=r"(?s)not possible:.*stages.0.blocks.0 .*: it has 20 channels"):
            ck.accelerate(model, kernels="required")
        with pytest.raises(RuntimeError, match="the model has no block of ConvFirst or of timm's ConvNeXt"):
            ck.accelerate(timm.create_model("resnet18"), kernels="required")
        assert not any("forward" in m.__dict__ for m in model.modules())

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_required_needs_a_device(self):
        with pytest.raises(RuntimeError, match="there is no CUDA device"):
            ck.accelerate(build("convnext"), kernels="required")

    def test_required_call_on_a_cpu_tensor(self, images):
        network = build("convnext")
        for block in network.modules():
            if read_block(block) is not None:
                block.forward = FusedForward(block, "required", frozen=False)
        with pytest.raises(RuntimeError, match="ConvNeXtBlock: kernels='required', but x is on cpu"):
            network(images)

    def test_off_takes_fused_forwards_away(self, network):
        ck.accelerate(network)
        assert any("forward" in m.__dict__ for m in network.modules())
        report = ck.accelerate(network, kernels="off")
        assert not any("forward" in m.__dict__ for m in network.modules())
        assert not report.swapped

    def test_unknown_mode(self, network):
        with pytest.raises(ValueError, match="kernels='always'; accepted: 'auto', 'required', 'off'"):
            ck.accelerate(network, kernels="always")

    def test_auto_on_a_cpu_runs_plain_code(self, network, images):
        with torch.no_grad():
            expected = network(images)
            ck.accelerate(network)
            assert torch.equal(network(images), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layer", [nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 1, groups=2), nn.Linear(8, 16)])
def test_fold(layer, bias, affine):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer)
    if not bias:
        layer.bias = None
    linear = isinstance(layer, nn.Linear)
    norm = nn.BatchNorm1d(16, affine=affine) if linear else nn.BatchNorm2d(16, affine=affine)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    norm.eval()
    x = torch.randn(4, 8) if linear else torch.randn(4, layer.in_channels, 5, 5)
    expected = norm(layer(x))
    folded = copy.deepcopy(layer)
    weight, shift = fold(layer, norm)
    folded.weight, folded.bias = nn.Parameter(weight), nn.Parameter(shift)
    torch.testing.assert_close(folded(x), expected)
    assert weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["convfirst", "convfirst-bare", "convnext", "convnext-conv-mlp"])
def test_absorbed_vectors_leave_the_result_alone(name):
    block = next(module for module in build(name).modules() if read_block(module) is not None)
    parts = read_block(block)
    x = torch.randn(2, parts.conv.in_channels, 9, 7).to(memory_format=torch.channels_last)
    with torch.no_grad():
        plain, absorbed = parts.pack(torch.float32), parts.pack(torch.float32, absorb=True)
        assert absorbed.norm_weight is absorbed.norm_bias is absorbed.layer_scale is None
        torch.testing.assert_close(
            run_block(x, absorbed, kernels="off"), run_block(x, plain, kernels="off"), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norms_around_a_block(bias):
    """Their factors leave the convolution's and the projection's weights alone; a factor of zero leaves its shift."""
    block = build("convfirst-batchnorm").stages[1].blocks[0]
    with torch.no_grad():
        block.project_norm.weight[:3] = torch.tensor([0.0, 1e-6, 1e-30])
        block.project_norm.weight[3] = -0.7
        block.norm.weight[1] = 0.0
        if bias:
            for layer in (block.conv, block.project):
                layer.bias = nn.Parameter(torch.randn(layer.out_channels))
        parts = read_block(block)
        packed = parts.pack(torch.float32, absorb=True)
        x = torch.randn(2, 64, 9, 7).to(memory_format=torch.channels_last)
        torch.testing.assert_close(run_block(x, packed, kernels="off"), block(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(packed.conv_weight, pack_conv_weight(block.conv.weight, torch.float32))
        # The mean leaves in float32, before the kernel rounds the convolution's results.
        assert torch.equal(packed.conv_bias, (block.conv.bias if bias else 0) - block.norm.running_mean)
        assert torch.equal(packed.project_weight[3:], block.project.weight.flatten(1)[3:])
        assert packed.project_bias.abs().max() < 65504  # which float16 holds
        half = parts.pack(torch.bfloat16, absorb=True)
        assert torch.equal(half.project_weight[3:], block.project.weight.flatten(1)[3:].bfloat16())


def test_packing_ignores_autocast():
    parts = read_block(build("convfirst-batchnorm").stages[1].blocks[0])
    with torch.no_grad():
        expected = parts.pack(torch.bfloat16, absorb=True)
        with torch.autocast("cpu", torch.bfloat16):
            packed = parts.pack(torch.bfloat16, absorb=True)
    for a, b in zip(packed[:9], expected[:9], strict=True):
        assert a is b is None or torch.equal(a, b)


def test_half_precision_batch_norm_folds_in_float32():
    layer, norm = nn.Conv2d(8, 8, 1).half(), nn.BatchNorm2d(8).half().eval()
    weight, shift = fold(layer, norm)
    assert weight.dtype == shift.dtype == torch.float32


def test_importing_needs_no_model_library():
    code = "import sys, convfirst_kernels; sys.exit(any(m in sys.modules for m in ('timm', 'convfirst')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
