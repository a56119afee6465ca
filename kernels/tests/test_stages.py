"""The stage in one launch: packing, CPU path, and that it stands in only where it may."""

import convfirst.models  # noqa: F401
import pytest
import timm
import torch
from cases import Case, inputs

import convfirst_kernels as ck
from convfirst_kernels import acceleration, patches, reference, stages
from convfirst_kernels.block import BlockWeights
from convfirst_kernels.planner import Problem


def blocks(channels: int, count: int, seed: int, **case) -> tuple[torch.Tensor, list[BlockWeights]]:
    problem = Problem(2, 5, 7, channels, 4 * channels, 3, 8, "float16", "silu", True)
    wanted = Case(problem, **{"affine": False, "layer_scale": False, **case})
    drawn = [inputs(wanted, seed + i, "cpu") for i in range(count)]
    return drawn[0][0], [BlockWeights(*arguments[1:10], *arguments[12:]) for arguments in drawn]


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_operator_is_the_chain_of_blocks(biases, begins, seed):
    x, packed = blocks(16, 3, seed, biases=biases)
    weights, down, expected = stages.pack_stage(packed), None, x
    if begins:
        x, weight, bias = torch.randn(2, 8, 11, 14).half(), torch.randn(16, 32).half() * 0.2, torch.randn(16)
        down, expected = stages.pack_down(weight, bias, 1e-6, True), patches.downsample(x, weight, bias, 1e-6, True)
        torch.testing.assert_close(down.vectors.view(16, 5)[:, 3], weight.float()[:, 16:24].sum(1))
    y = stages.run_stage(x, weights, down, torch.zeros(256, dtype=torch.uint8))
    for *arguments, act, epsilon, norm in packed:
        expected = reference.conv_first_block(expected, *arguments, None, 8, act, epsilon, norm)
    assert torch.equal(y, expected)
    for block, part in zip(packed, stages.unpack_stage(weights), strict=True):
        for a, b in zip(block, part, strict=True):
            if a is None and b is not None:
                assert not b.any()
            else:
                assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_sums_are_of_rounded_weights(seed):
    _, packed = blocks(16, 2, seed)
    vectors = stages.pack_stage(packed).expand_vectors.view(2, 64, 2)
    torch.testing.assert_close(vectors[1, :, 1], packed[1].expand_weight.float().sum(1))


@pytest.mark.parametrize("case", [{"affine": True}, {"layer_scale": True}])
def test_vectors_that_must_be_absorbed(case, seed):
    assert stages.pack_stage(blocks(16, 2, seed, **case)[1]) is None


def test_blocks_that_differ(seed):
    _, packed = blocks(16, 2, seed)
    assert stages.pack_stage([packed[0], packed[1]._replace(activation="gelu")]) is None
    assert stages.pack_stage([packed[0], packed[1]._replace(conv_bias=None)]) is None
    assert stages.pack_stage([packed[0]._replace(conv_weight=packed[0].conv_weight[:, :, :4])]) is None


def test_only_frozen_models_have_stages_in_one_launch():
    model = timm.create_model("convfirst_atto", num_classes=5).eval()
    ck.accelerate(model)
    assert not any(isinstance(m.__dict__.get("forward"), acceleration.StageForward) for m in model.modules())
    ck.accelerate(model, frozen=True)
    found = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), acceleration.StageForward)]
    assert len(found) == 4
    x = torch.randn(1, 3, 64, 64)
    y = model(x)  # on a CPU every block runs its own code
    ck.accelerate(model, kernels="off")
    assert not any("forward" in m.__dict__ for m in model.modules())
    torch.testing.assert_close(model(x), y)
