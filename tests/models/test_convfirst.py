import re

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convfirst.models import ConvFirstBlock, convfirst

SIZES = ("atto", "nano", "tiny", "small", "base")
NORMS = ("layernorm", "batchnorm")


def small(norm="layernorm", **kwargs):
    """Two blocks a stage at the smallest widths, with a layer scale that lets every block matter."""
    defaults = dict(num_classes=10, dims=(16, 32), depths=(2, 2), ls_init_value=0.5, norm=norm)
    return convfirst.ConvFirst(**{**defaults, **kwargs})


def macs_and_parameters(name: str) -> tuple[float, float]:
    with torch.device("meta"):
        model = timm.create_model(name)
        image = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() / 2, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_family_table_of_the_docstring(size):
    row = re.search(rf"convfirst_{size} +(\S+) +(\S+) +(\S+) +(\S+)M$", convfirst.__doc__, re.MULTILINE)
    widths, depths, gmacs, mparams = row.groups()
    macs, params = macs_and_parameters(f"convfirst_{size}")
    assert f"{macs / 1e9:.2f}" == gmacs
    assert f"{params / 1e6:.2f}" == mparams
    with torch.device("meta"):
        model = timm.create_model(f"convfirst_{size}")
    assert "/".join(str(len(stage.blocks)) for stage in model.stages) == depths
    assert "/".join(str(info["num_chs"]) for info in model.feature_info) == widths


@pytest.mark.parametrize(
    "size, peer, at_most",
    [("tiny", "convnext_tiny", 0.75), ("small", "convnext_small", 0.85), ("base", "convnext_base", 0.85)],
)
def test_costs_less_than_its_convnext(size, peer, at_most):
    assert macs_and_parameters(f"convfirst_{size}")[0] <= at_most * macs_and_parameters(peer)[0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("group_width", [8, 16])
def test_block_computes_the_paper_order(norm, group_width):
    block = ConvFirstBlock(32, group_width=group_width, norm=norm, layer_scale=0.5).double().eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 32, 7, 5, dtype=torch.float64)
    y = block.norm(nn.functional.conv2d(x, block.conv.weight, block.conv.bias, padding=1, groups=32 // group_width))
    y = torch.einsum("oi,nihw->nohw", block.expand.weight[..., 0, 0], y)
    y = block.expand_norm(y if block.expand.bias is None else y + block.expand.bias[:, None, None])
    y = torch.einsum("oi,nihw->nohw", block.project.weight[..., 0, 0], y * torch.sigmoid(y))
    y = block.project_norm(y if block.project.bias is None else y + block.project.bias[:, None, None])
    torch.testing.assert_close(block(x), x + 0.5 * y)


@pytest.mark.parametrize("norm, norms, biased", [("layernorm", 1, True), ("batchnorm", 3, False)])
def test_norms_and_biases_of_a_block(norm, norms, biased):
    block = ConvFirstBlock(16, norm=norm)
    kind = nn.BatchNorm2d if norm == "batchnorm" else nn.LayerNorm
    assert sum(isinstance(m, kind) for m in block.modules()) == norms
    assert all((conv.bias is not None) == biased for conv in (block.conv, block.expand, block.project))


def test_layer_scale_starts_the_block_as_nearly_the_identity():
    x = torch.randn(1, 16, 8, 8)
    assert (ConvFirstBlock(16)(x) - x).abs().max() < 1e-4
    assert isinstance(ConvFirstBlock(16, layer_scale=None).layer_scale, nn.Identity)


def test_drop_path_rises_linearly_to_its_rate():
    model = timm.create_model("convfirst_atto", drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("norm", NORMS)
def test_initialisation_is_that_of_convnext(norm):
    model = timm.create_model("convfirst_atto", norm=norm)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert module.bias is None or not module.bias.any()
    assert all((p == 1e-6).all() for name, p in model.named_parameters() if name.endswith("gamma"))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("stem_stride, resolution", [(4, 8), (2, 16), (1, 32)])
def test_atto_takes_small_images(norm, stem_stride, resolution):
    model = timm.create_model("convfirst_atto", num_classes=10, in_chans=1, norm=norm, stem_stride=stem_stride)
    image = torch.randn(2, 1, 32, 32)
    assert model.stem(image).shape == (2, 32, resolution, resolution)
    assert model(image).shape == (2, 10)


@pytest.mark.parametrize("shape", [(33, 47), (64, 32)])
def test_any_image_size_above_the_stride(shape):
    assert timm.create_model("convfirst_atto", num_classes=5)(torch.randn(1, 3, *shape)).shape == (1, 5)


def test_features_only_gives_each_stage():
    backbone = timm.create_model("convfirst_atto", features_only=True)
    features = backbone(torch.randn(1, 3, 64, 64))
    assert [tuple(f.shape) for f in features] == [(1, 32, 16, 16), (1, 64, 8, 8), (1, 128, 4, 4), (1, 256, 2, 2)]
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    chosen = timm.create_model("convfirst_atto", features_only=True, out_indices=(1, 3))
    assert chosen.feature_info.channels() == [64, 256]


def test_intermediates_equal_the_stages_outputs():
    model = timm.create_model("convfirst_atto", num_classes=10).eval()
    image = torch.randn(1, 3, 64, 64)
    last, features = model.forward_intermediates(image)
    torch.testing.assert_close(last, model.forward_features(image))
    torch.testing.assert_close(model.forward_head(last), model(image))
    torch.testing.assert_close(model.forward_intermediates(image, 1, intermediates_only=True)[0], features[-1])
    early = model.forward_intermediates(image, [0, 1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, features[:2])


def test_pruned_model_ends_at_the_last_index():
    model = timm.create_model("convfirst_atto")
    assert model.prune_intermediate_layers([1]) == [1]
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 64, 8, 8)


@pytest.mark.parametrize("classes", [0, 7])
def test_reset_classifier(classes):
    model = timm.create_model("convfirst_atto")
    model.reset_classifier(classes)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, classes or model.num_features)
    assert model.num_classes == classes
    features = model.forward_features(torch.randn(2, 3, 32, 32))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


def test_registered_with_timm_and_its_pretrained_cfg():
    assert {f"convfirst_{size}" for size in SIZES} <= set(timm.list_models("convfirst_*"))
    model = timm.create_model("convfirst_atto")
    names = dict(model.named_modules())
    assert names[model.pretrained_cfg["first_conv"]] is model.stem.conv1
    assert names[model.pretrained_cfg["classifier"]] is model.get_classifier()
    assert timm.data.resolve_data_config({}, model=model)["input_size"] == (3, 224, 224)


def test_layer_decay_orders_the_layers_by_depth():
    model = timm.create_model("convfirst_atto", num_classes=10)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    blocks = [block for stage in model.stages for block in stage.blocks]
    in_order = [model.stem.conv1, *(block.conv for block in blocks), model.head.fc]
    scales = [scale[id(module.weight)] for module in in_order]
    assert scales == sorted(set(scales)), "each layer's rate exceeds that of the layer before it"
    assert scale[id(model.head.fc.weight)] == 1
    assert {decay[id(p)] for p in model.parameters() if p.ndim <= 1} == {0}
    assert {decay[id(p)] for p in model.parameters() if p.ndim > 1} == {0.05}


@pytest.mark.parametrize("norm", NORMS)
def test_grad_checkpointing_changes_nothing_but_memory(norm):
    plain, checkpointed = small(norm, drop_path_rate=0.3), small(norm, drop_path_rate=0.3)
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.set_grad_checkpointing()
    image = torch.randn(4, 3, 32, 32)
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        model.train()(image).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("norm", NORMS)
def test_float64_gradients_are_exact(norm):
    block = ConvFirstBlock(8, norm=norm, expansion=1, layer_scale=0.5).double()
    assert torch.autograd.gradcheck(block, torch.randn(2, 8, 3, 2, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_agree_with_float32(dtype):
    model = small().eval()
    image = torch.randn(2, 3, 32, 32)
    expected = model(image)
    actual = model.to(dtype)(image.to(dtype))
    assert actual.dtype == dtype
    tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float64 else dict(rtol=0.1, atol=0.02)
    torch.testing.assert_close(actual.float(), expected, **tolerance)


def test_channels_last_is_kept_through_the_stages():
    model = small().to(memory_format=torch.channels_last)
    image = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    features = model.forward_features(image)
    assert features.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(features, model.forward_features(image.contiguous()))


def test_compiles_without_a_graph_break():
    model = small(depths=(1, 1)).eval()
    image = torch.randn(1, 3, 16, 16)
    expected = model(image)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(image), expected)


def test_exports_as_one_graph():
    model = small(depths=(1, 1)).eval()
    image = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), model(image))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(norm="groupnorm"), "norm='groupnorm' is unknown; accepted: 'layernorm', 'batchnorm'"),
        (dict(group_width=12), "dim=16 is not a multiple of group_width=12"),
        (dict(kernel_size=4), "kernel_size=4 is even"),
        (dict(stem_stride=3), "stem_stride=3 is unsupported; accepted: 4, 2, 1"),
        (dict(depths=(1, 2, 3)), r"dims=\(16, 32\) and depths=\(1, 2, 3\) differ in length"),
    ],
)
def test_bad_options_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


@pytest.mark.parametrize("norm", NORMS)
def test_learns_to_overfit_a_batch(norm):
    model = small(norm, depths=(1, 1))
    image, label = torch.randn(8, 3, 16, 16), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
