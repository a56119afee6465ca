"""The stage in one launch: packing, CPU path, and that it stands in only where it may."""

import convfirst.models  # noqa: F401
import pytest
import timm
import torch
from cases import Case, inputs

import convfirst_kernels as ck
from convfirst_kernels import acceleration, inference, patches, reference, stages
from convfirst_kernels.block import BlockWeights
from convfirst_kernels.planner import Problem


def blocks(channels: int, count: int, seed: int, **case) -> tuple[torch.Tensor, list[BlockWeights]]:
    problem = Problem(2, 5, 7, channels, 4 * channels, 3, 8, "float16", "silu", True)
    wanted = Case(problem, **{"affine": False, "layer_scale": False, **case})
    drawn = [inputs(wanted, seed + i, "cpu") for i in range(count)]
    return drawn[0][0], [BlockWeights(*arguments[1:10], *arguments[12:]) for arguments in drawn]


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("vectors", [True, False])
def test_operator_is_the_chain_of_blocks(vectors, begins, seed):
    x, packed = blocks(16, 3, seed, biases=vectors, layer_scale=vectors)
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
        for name, a, b in zip(BlockWeights._fields, block, part, strict=True):
            if a is None and b is not None:
                assert (b == (name == "layer_scale")).all()
            else:
                assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_workspace():
    memory = stages.workspace(torch.device("cpu"))
    assert not memory[: stages.WORKSPACE_COUNTERS].any() and (memory[stages.WORKSPACE_COUNTERS :] == 255).all()


def test_sums_are_of_rounded_weights(seed):
    _, packed = blocks(16, 2, seed)
    vectors = stages.pack_stage(packed).expand_vectors.view(2, 64, 2)
    torch.testing.assert_close(vectors[1, :, 1], packed[1].expand_weight.float().sum(1))


def test_affine_part_must_be_absorbed(seed):
    assert stages.pack_stage(blocks(16, 2, seed, affine=True)[1]) is None


def test_blocks_that_differ(seed):
    _, packed = blocks(16, 2, seed)
    assert stages.pack_stage([packed[0], packed[1]._replace(activation="gelu")]) is None
    assert stages.pack_stage([packed[0], packed[1]._replace(conv_bias=None)]) is None
    assert stages.pack_stage([packed[0], packed[1]._replace(layer_scale=torch.ones(16))]) is None
    assert stages.pack_stage([packed[0]._replace(conv_weight=packed[0].conv_weight[:, :, :4])]) is None


def stand_ins(model: torch.nn.Module) -> list[acceleration.StageForward]:
    found = [module.__dict__.get("forward") for module in model.modules()]
    return [forward for forward in found if isinstance(forward, acceleration.StageForward)]


def test_only_where_asked_for():
    model = timm.create_model("convfirst_atto", num_classes=5).eval()
    ck.accelerate(model, whole_stages=True)
    assert not stand_ins(model)
    ck.accelerate(model, frozen=True)
    assert not stand_ins(model)
    ck.accelerate(model, frozen=True, whole_stages=True)
    assert len(stand_ins(model)) == 4
    x = torch.randn(1, 3, 64, 64)
    y = model(x)  # on a CPU every block runs its own code
    ck.accelerate(model, kernels="off")
    assert not any("forward" in m.__dict__ for m in model.modules())
    torch.testing.assert_close(model(x), y)


@pytest.fixture(params=["layernorm", "batchnorm"])
def covered_nano(monkeypatch, request):
    """A frozen ConvFirst whose stages take up to three images, as on a GPU that covers them."""
    model = timm.create_model("convfirst_nano", num_classes=7, norm=request.param, ls_init_value=0.3)
    model = model.half().eval().requires_grad_(False)
    ck.accelerate(model, frozen=True, whole_stages=True)
    for stand_in in stand_ins(model):
        layers = [block.__dict__["forward"] for block in stand_in.stage.blocks]
        if "forward" in stand_in.stage.downsample.__dict__:
            layers.append(stand_in.stage.downsample.__dict__["forward"])
        for layer in layers:
            layer.packed = layer.read().pack(torch.float16, absorb=True)
            layer.packed_for = torch.float16, torch.device("cpu")
        stand_in._pack()
        assert stand_in.weights is not None
        # A factor of one would cost the blocks' own kernels a pass over their results.
        blocks = [block.__dict__["forward"].packed for block in stand_in.stage.blocks]
        assert all((packed.layer_scale is None) == (request.param == "layernorm") for packed in blocks)

    @torch.compiler.assume_constant_result
    def refusal(batch: int, *problem) -> str:
        return "" if batch < 4 else "too many"

    monkeypatch.setattr(stages, "refusal", refusal)
    monkeypatch.setattr(acceleration, "refusal", lambda *arguments: None)
    return model


def test_stages_are_traced_whole(covered_nano):
    """torch.compile sees one operator a stage, or, for more images, the blocks."""
    assert [stand_in.down is None for stand_in in stand_ins(covered_nano)] == [True, False, False, False]
    seen = []

    def backend(graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        seen.append(sum("conv_first_stage" in target for target in targets))
        return graph.forward

    for images, launches in ((1, 4), (4, 0)):
        torch._dynamo.reset()
        x = torch.randn(images, 3, 64, 64).half()
        with torch.inference_mode():
            expected = covered_nano(x)
            y = torch.compile(covered_nano, dynamic=False, backend=backend, fullgraph=True)(x)
        assert seen.pop() == launches
        torch.testing.assert_close(y, expected)


def test_fake_implementation(seed):
    x, packed = blocks(16, 2, seed)
    *tensors, activation, eps, has_norm = stages.pack_stage(packed)
    down = stages.pack_down(torch.randn(16, 32).half(), torch.randn(16), 1e-6, True)
    for begin, settings, image in (((None, None), (0.0, False), x), (down[:2], down[2:], x[:, :8])):
        image = image.contiguous(memory_format=torch.channels_last)
        workspace = torch.zeros(256, dtype=torch.uint8)
        arguments = image, *tensors, *begin, workspace, activation, eps, has_norm, *settings
        utilities = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.convfirst.conv_first_stage.default, arguments, test_utils=utilities)


def test_calls_take_turns():
    """A call from another stream waits for the last one's; one from the same stream waits for nothing."""
    waits = []

    class Stream:
        def wait_stream(self, other):
            waits.append((self, other))

    first, second, turns = Stream(), Stream(), inference._Turns()
    with pytest.MonkeyPatch.context() as patch:
        for stream in (first, first, second, second, first):
            patch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
            with turns.taken(torch.device("cuda", 0)):
                pass
    assert waits == [(second, first), (first, second)]
