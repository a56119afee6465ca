"""What a trace counts, and what each way of running it moves, against counts by hand."""

import pytest
import timm
import torch
from torch import nn

import convfirst.models  # noqa: F401  registers ConvFirst with timm
from convfirst.analysis import blocks, kernels, layers, trace
from convfirst.analysis.trace import meta_model
from convfirst.models import ConvFirstBlock


def create(name: str) -> nn.Module:
    return meta_model(name)


def test_models_whose_constructor_the_meta_device_cannot_run(monkeypatch):
    def constructor(name):
        widths = torch.tensor([8, 8, 16])
        if widths.is_meta:
            raise NotImplementedError("aten::_unique2: attempted to run this operator with Meta tensors")
        return nn.Linear(int(widths.max()), 4)

    monkeypatch.setattr(timm, "create_model", constructor)
    model = meta_model("regnety_016")
    assert model.weight.is_meta and model.weight.shape == (4, 16)


@pytest.mark.parametrize(
    "name, gmacs, count",
    [
        ("convnext_tiny", 4.5, 18),  # ConvNeXt's README: 4.5 G; 3 + 3 + 9 + 3 blocks
        ("resnet50", 4.1, 16),  # torchvision's documentation: 4.09
        ("efficientnet_b0", 0.39, 15),  # the paper's table 2: 0.39 B; 16 blocks, the first without a shortcut's class
        ("regnety_032", 3.2, 21),  # timm's model_benchmark: 3.2
        ("convfirst_tiny", 3.3, 29),
        ("vgg11", 7.6, 0),
    ],
)
def test_published_macs_and_residual_blocks(name, gmacs, count):
    traced = trace(create(name))
    assert traced.macs / 1e9 == pytest.approx(gmacs, abs=0.051 if gmacs > 1 else 0.006)
    assert len(traced.blocks) == len(blocks(traced)) == count


def test_macs_scale_with_the_batch_and_partitions_keep_them():
    one, four = (trace(create("convfirst_atto"), batch, 64) for batch in (1, 4))
    assert four.macs == 4 * one.macs
    for partition in ("layer_by_layer", "compiled", "block_fused"):
        assert sum(kernel.macs for kernel in kernels(four, partition)) == four.macs
    assert sum(layer.macs for layer in layers(four)) == four.macs


@pytest.mark.parametrize("dtype, size", [(torch.float16, 2), (torch.bfloat16, 2), (torch.float32, 4)])
def test_a_fused_block_reads_its_input_and_writes_its_output(dtype, size):
    channels, batch, side = 64, 3, 14
    traced = trace(nn.Sequential(ConvFirstBlock(channels)), batch, side, dtype, in_chans=channels)
    (block,) = kernels(traced, "block_fused")
    pixels = batch * side * side
    assert block.activation_bytes == 2 * channels * size * pixels  # 4 C bytes a pixel in 16 bit
    assert block.macs == pixels * (3 * 3 * 8 * channels + 2 * 4 * channels**2)
    weights = 3 * 3 * 8 * channels + channels + 2 * channels + 8 * channels**2 + 4 * channels + channels + channels
    assert block.weight_bytes == size * weights


def test_layer_by_layer_moves_each_tensor_between_operations():
    channels, hidden, pixels = 16, 64, 4 * 8 * 8
    traced = trace(nn.Sequential(ConvFirstBlock(channels)), 4, 8, in_chans=channels)
    moved = [kernel.activation_bytes / (2 * pixels) for kernel in kernels(traced, "layer_by_layer")]
    c, h = channels, hidden
    # convolution, norm, expand, activation, project, layer scale, addition of the shortcut
    assert moved == [2 * c, 2 * c, c + h, 2 * h, c + h, 2 * c, 3 * c]
    # The scale and the addition become one kernel, which spares a write and a read.
    assert [k.activation_bytes / (2 * pixels) for k in kernels(traced, "compiled")][-1] == 3 * c


def test_in_place_operations_read_and_write_in_turn():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1))
    first, relu, last = kernels(trace(model, 2, 4), "layer_by_layer")
    assert relu.read_bytes == first.write_bytes == relu.write_bytes == last.read_bytes == 2 * 2 * 8 * 16


def test_views_cost_nothing():
    class Flatten(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 1)[:, :4].relu()

    (relu,) = kernels(trace(Flatten(), 2, 4), "layer_by_layer")
    assert relu.name == "model: relu"
    assert relu.activation_bytes == 2 * (2 * 2 * 4)  # what the slice reads, and as much written


def test_a_value_used_outside_is_written_though_its_kernel_goes_on():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1, bias=False)

        def forward(self, x):
            kept = x.relu()
            return self.conv(kept.sigmoid()) + kept

    pointwise, conv, add = kernels(trace(Two(), 1, 4), "compiled")
    one = 2 * 3 * 16
    assert (pointwise.read_bytes, pointwise.write_bytes) == (one, 2 * one)
    assert (conv.read_bytes, add.read_bytes, add.write_bytes) == (one, 2 * one, one)


def test_a_view_of_a_parameter_may_be_a_modules_input():
    """As that of the class token in CaiT and PiT is."""

    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.relu = nn.Parameter(torch.zeros(1, 3, 1, 1)), nn.ReLU()

        def forward(self, x):
            return x + self.relu(self.token.expand_as(x))

    model = Token()
    assert [operation.name for operation in trace(model, 1, 4).operations] == ["relu", "add"]
    assert model.token.requires_grad


def test_the_dtype_of_a_contraction_is_told():
    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Attention())
    # PyTorch's fallback for attention computes 16 bits in float32.
    for dtype in (torch.float16, torch.float32):
        traced = trace(model, 1, 8, dtype)
        assert [(o.name, o.dtype) for o in traced.contractions] == [
            ("convolution", dtype), ("bmm", torch.float32), ("bmm", torch.float32),
        ]  # fmt: skip


def test_layers_and_the_model_itself_are_left_alone():
    model = timm.create_model("convfirst_atto")
    before = {name: (value.dtype, value.device) for name, value in model.state_dict().items()}
    names = [layer.name for layer in layers(trace(model, 1, 32))]
    assert "stages.0.blocks.0.expand: convolution" in names
    assert {name: (value.dtype, value.device) for name, value in model.state_dict().items()} == before
    assert model.training


@pytest.mark.parametrize("argument", [{"batch": 0}, {"image_size": -1}])
def test_sizes_below_one_are_named(argument):
    ((name, value),) = argument.items()
    with pytest.raises(ValueError, match=f"{name}={value} must be at least 1"):
        trace(nn.Identity(), **argument)


def test_unknown_partitions_are_named():
    with pytest.raises(ValueError, match="partition='fused' is unknown; accepted: layer_by_layer, compiled"):
        kernels(trace(nn.ReLU(), 1, 4), "fused")
