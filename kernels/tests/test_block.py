"""The operator on a CPU: shapes, fakes, opcheck, gradients, packing, folding, planner."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import (
    Case,
    conv_first_cases,
    convnext_cases,
    draws_of,
    guarded,
    inputs,
    matrix_tile_max,
    oracle,
    small_cases,
    worst_ratio,
    worst_ratio_of,
)
from torch import nn

import convfirst_kernels as ck
from convfirst_kernels import reference
from convfirst_kernels.block import run_block
from convfirst_kernels.planner import plan, problems_of

block = torch.ops.convfirst.conv_first_block
block_backward = torch.ops.convfirst.conv_first_block_backward
TENSORS = 11
CASES = [c for c in small_cases() if c.problem.channels <= 128]
BARE = Case(ck.Problem(2, 5, 4, 32, 128), biases=False, affine=False, layer_scale=False)


def widened(arguments: tuple, dtype: torch.dtype) -> list:
    return [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in arguments]


class Plain(nn.Module):
    """The block as a network would write it, in PyTorch's own layouts."""

    def __init__(self, channels: int, group_width: int, kernel_size: int, expansion: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels // group_width)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, channels * expansion)
        self.project = nn.Conv2d(channels * expansion, channels, 1)
        self.scale = nn.Parameter(torch.randn(channels))

    def forward(self, x):
        h = F.silu(self.expand(self.norm(self.conv(x).permute(0, 2, 3, 1))))
        return x + self.scale[:, None, None] * self.project(h.permute(0, 3, 1, 2))

    def fused(self, x, **options):
        return ck.conv_first_block(
            x, self.conv.weight, self.conv.bias, self.norm.weight, self.norm.bias, self.expand.weight,
            self.expand.bias, self.project.weight, self.project.bias, self.scale, **options,
        )  # fmt: skip


@pytest.mark.parametrize(("group_width", "kernel_size"), [(8, 3), (16, 5), (1, 7)])
def test_matches_plain_modules(group_width, kernel_size):
    torch.manual_seed(0)
    module = Plain(32, group_width, kernel_size).double()
    x = torch.randn(2, 32, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(module.fused(x), module(x))


def test_gradients_reach_natural_weights():
    torch.manual_seed(0)
    module = Plain(32, 8, 3).double()
    x = torch.randn(2, 32, 5, 4, dtype=torch.float64)
    weights = ck.pack_block(
        module.conv.weight, module.conv.bias, module.norm.weight, module.norm.bias, module.expand.weight,
        module.expand.bias, module.project.weight, module.project.bias, module.scale, activation="silu", eps=1e-6,
        has_norm=True, dtype=torch.float64,
    )  # fmt: skip
    y = block(x, *weights[:9], None, 8, "silu", 1e-6, True)
    ours = torch.autograd.grad(y.square().sum(), list(module.parameters()))
    theirs = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # vectors are packed in float32


@pytest.mark.parametrize("case", [*CASES, BARE], ids=str)
def test_fake_agrees(case):
    """Shape, dtype, strides and device of the fake result are the real one's."""
    arguments = inputs(case, 0, device="cpu")
    real = block(*arguments)
    mode = torch._subclasses.FakeTensorMode()
    fake_arguments = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    with mode:
        fake = block(*fake_arguments)
    assert (fake.shape, fake.dtype, fake.stride(), fake.device) == (real.shape, real.dtype, real.stride(), real.device)
    assert real.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", [CASES[1], BARE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opcheck_forward(case, dtype):
    arguments = widened(inputs(case, 0, device="cpu"), dtype)
    if dtype != torch.float32:
        arguments = [a.float() if isinstance(a, torch.Tensor) and a.dim() == 1 else a for a in arguments]
    arguments = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    # Eager and traced backward sum 16-bit values in another order.
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.5}
    torch.library.opcheck(block.default, tuple(arguments), **tolerance)


@pytest.mark.parametrize("case", [CASES[1], BARE], ids=str)
@pytest.mark.parametrize("mask", [[True] * TENSORS, [False] * TENSORS, [i % 3 == 0 for i in range(TENSORS)]])
def test_opcheck_backward(case, mask):
    arguments = inputs(case, 0, device="cpu")
    torch.library.opcheck(block_backward.default, (torch.randn_like(arguments[0]), *arguments, mask))


def test_opcheck_out():
    arguments = inputs(BARE, 0, device="cpu")
    out = guarded(*arguments[0].shape, arguments[0].dtype, "cpu", guard=0)
    torch.library.opcheck(torch.ops.convfirst.conv_first_block_out.default, arguments, {"out": out})


@pytest.mark.parametrize("activation", ck.ACTIVATIONS)
@pytest.mark.parametrize("case", [CASES[1], BARE], ids=str)
def test_backward_is_the_references(case, activation):
    arguments = widened(inputs(case, 0, device="cpu"), torch.float64)
    arguments[12] = activation
    leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    tensors = [a for a in leaves if isinstance(a, torch.Tensor)]
    upstream = torch.randn_like(leaves[0])
    ours = torch.autograd.grad(block(*leaves), tensors, upstream)
    theirs = torch.autograd.grad(reference.conv_first_block(*leaves), tensors, upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_only_wanted_gradients_are_computed():
    arguments = list(inputs(CASES[1], 0, device="cpu"))
    arguments[5].requires_grad_()
    block(*arguments).sum().backward()
    assert arguments[5].grad.shape == arguments[5].shape
    gradients = block_backward(torch.ones_like(arguments[0]), *arguments, [i == 5 for i in range(TENSORS)])
    assert [g.numel() > 0 for g in gradients] == [i == 5 for i in range(TENSORS)]


def test_upstream_gradient_of_any_layout():
    arguments = widened(inputs(CASES[1], 0, device="cpu"), torch.float64)
    arguments[0].requires_grad_()
    (expanded,) = torch.autograd.grad(block(*arguments).sum(), arguments[0])
    y = block(*arguments)
    (dense,) = torch.autograd.grad(y, arguments[0], torch.ones(y.shape, dtype=y.dtype))
    torch.testing.assert_close(expanded, dense)


def test_compile_without_graph_break():
    arguments = inputs(CASES[1], 0, device="cpu")
    module = Plain(32, 8, 3)

    def network(x, y):
        return block(x, *arguments[1:]) + 1, module.fused(y)

    x, y = arguments[0], torch.randn(2, 32, 5, 4)
    for a, b in zip(torch.compile(network, fullgraph=True, backend="aot_eager")(x, y), network(x, y), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_casts_matrices_and_keeps_vectors():
    arguments = inputs(CASES[1], 0, device="cpu")
    rounded = [a.bfloat16() if i in (0, 1, 5, 7) else a for i, a in enumerate(arguments)]
    with torch.autocast("cpu", torch.bfloat16):
        y = block(*widened(arguments, torch.float32))
    torch.testing.assert_close(y, block(*rounded), rtol=0, atol=0)
    module = Plain(32, 8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.fused(torch.randn(2, 32, 5, 4)).dtype == torch.bfloat16


def test_packing_round_trip():
    weight = torch.randn(48, 8, 5, 5)
    packed = ck.pack_conv_weight(weight, torch.float16)
    assert packed.shape == (25, 48, 8) and packed.is_contiguous() and packed.dtype == torch.float16
    assert torch.equal(packed[7, 3], weight[3, :, 1, 2].half())
    assert torch.equal(reference.unpack_conv_weight(packed), weight.half())
    assert ck.pack_vector(None) is None
    assert ck.pack_vector(torch.ones(4, dtype=torch.bfloat16)).dtype == torch.float32


def test_required_refuses_the_cpu_and_auto_logs_once(caplog, monkeypatch):
    module = Plain(32, 8, 3)
    x = torch.randn(1, 32, 4, 4)
    with pytest.raises(RuntimeError, match="kernels='required', but x is on cpu"):
        module.fused(x, kernels="required")
    with pytest.raises(ValueError, match="kernels='maybe'; accepted: 'auto', 'required', 'off'"):
        module.fused(x, kernels="maybe")
    monkeypatch.setattr("convfirst_kernels.block._logged", set())
    for _ in range(3):
        module.fused(x)
    assert len([r for r in caplog.records if "x is on cpu" in r.message]) == 1


def test_run_block_takes_packed_weights():
    module = Plain(32, 8, 3)
    x = torch.randn(2, 32, 4, 4)
    weights = ck.pack_block(
        module.conv.weight, module.conv.bias, module.norm.weight, module.norm.bias, module.expand.weight,
        module.expand.bias, module.project.weight, module.project.bias, module.scale, activation="silu", eps=1e-6,
        has_norm=True, dtype=torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(run_block(x, weights), module(x))
    torch.testing.assert_close(run_block(x, weights, torch.zeros(2)), x)


class TestJudge:
    """The comparison that the GPU tests rest on."""

    def test_accepts_the_peer_itself(self):
        case = Case(ck.Problem(2, 20, 11, 64, 256))
        arguments = inputs(case, 0, device="cpu")
        peer = reference.conv_first_block(*arguments)
        assert worst_ratio(peer, oracle(arguments), peer) <= 0.5

    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
    def test_rejects_one_bad_tile(self, value):
        case = Case(ck.Problem(2, 20, 11, 64, 256))
        arguments = inputs(case, 0, device="cpu")
        truth = oracle(arguments)
        y = truth.half()
        y[1, 40:48, 16:, 8:] = value
        assert worst_ratio(y, truth, truth.half()) > 1

    def test_the_last_tile_is_as_large_as_the_others(self):
        error = torch.zeros(67, 40)
        error[66, 39], error[2, 7], error[3, 31] = 3, 2, 1
        assert matrix_tile_max(error, (64, 32)).squeeze().tolist() == [[2, 1], [1, 3]]  # rows 3-66, columns 8-39
        assert matrix_tile_max(error[:5, :7], (64, 32)).shape[-2:] == (1, 1)

    def test_draws_are_judged_together(self):
        truth = torch.zeros(1, 1, dtype=torch.float64)
        draws = [(truth.float() + ours, truth, truth.float() + theirs) for ours, theirs in ((4, 1), (1, 2))]
        assert worst_ratio_of(draws[:1], abs) > 1 >= worst_ratio_of(draws, abs)
        draws.append((truth.float() * float("nan"), truth, truth.float()))
        assert worst_ratio_of(draws, abs) == float("inf")
        assert [draws_of(values) for values in (45, 1024, 5000)] == [23, 1, 1]

    def test_oracle_in_slices(self, monkeypatch):
        import cases

        arguments = inputs(CASES[1], 0, device="cpu")
        whole = oracle(arguments)
        monkeypatch.setattr(cases, "SLICE_ELEMENTS", 1)
        torch.testing.assert_close(oracle(arguments), whole)

    def test_pairs_are_covered(self):
        problems = [c.problem for c in conv_first_cases()]
        for side in (3, 5):
            for channels in (32, 1024):
                assert any(p.kernel_size == side and p.channels == channels for p in problems)
        assert {(p.height, p.width) for p in problems} >= {(1, 1), (7, 7), (13, 17), (56, 56), (225, 193)}
        assert {p.batch for p in problems} == {1, 2, 3, 7, 128}
        assert {c.problem.channels for c in convnext_cases()} >= {40, 96, 768, 1536}
        assert conv_first_cases() == conv_first_cases()


class TestPlanner:
    PROBLEM = ck.Problem(128, 56, 56, 64, 256)

    def test_answers_without_a_gpu(self):
        answer = plan(self.PROBLEM, ck.Device.named("a100"))
        assert answer["problem"] == "C=64 hidden=256 k=3 group_width=8 float16 silu with norm, 128 x 56 x 56"
        for row in answer["candidates"]:
            assert bool(row["refusal"]) == ("config" not in row)
        able = [row for row in answer["candidates"] if not row["refusal"]]
        cheapest = min(able, key=lambda row: row["cost_us"])["name"] if able else None
        assert answer["chosen"] == cheapest

    def test_hopper_code_is_for_hopper(self):
        for name, capability in (("a100", 80), ("rtx4090", 89)):
            for row in plan(self.PROBLEM, ck.Device.named(name))["candidates"]:
                if row["name"].startswith("sm90"):
                    assert row["refusal"] == f"needs compute capability 90, the device has {capability}"

    def test_shared_memory_bounds(self):
        device = ck.Device(80, 108, 1024)
        for row in plan(self.PROBLEM, device)["candidates"]:
            assert row["refusal"] or row["config"]["shared_memory"] <= 1024

    def test_path_restricts(self):
        answer = plan(self.PROBLEM, ck.Device.named("h100"), "sm80")
        assert answer["chosen"] is None or answer["chosen"].startswith("sm80")
        for row in answer["candidates"]:
            if not row["name"].startswith("sm80"):
                assert row["refusal"] == "not on the requested path sm80"

    @pytest.mark.parametrize(
        ("channels", "side", "kernel_size", "group_width", "variant"),
        [
            (64, 56, 3, 8, "sm80_conv_first_c64"),
            (128, 28, 3, 8, "sm80_conv_first_c128"),
            (256, 14, 3, 8, "sm80_conv_first_split_persistent"),
            (512, 7, 3, 8, "sm80_conv_first_split_persistent"),
            (96, 56, 7, 1, "sm80_convnext_c96"),
            (192, 28, 7, 1, "sm80_convnext_split_persistent"),
            (384, 14, 7, 1, "sm80_convnext_split_persistent"),
            (768, 7, 7, 1, "sm80_convnext_split_persistent"),
        ],
    )
    def test_portable_path_in_the_measured_order(self, channels, side, kernel_size, group_width, variant):
        activation = "gelu" if group_width == 1 else "silu"
        problem = ck.Problem(128, side, side, channels, 4 * channels, kernel_size, group_width, activation=activation)
        assert plan(problem, ck.Device.named("h100"), "sm80")["chosen"] == variant

    @pytest.mark.parametrize(
        ("channels", "height", "width", "kernel_size", "group_width", "tile"),
        [
            (512, 7, 7, 3, 8, (1, 48)),  # pixels in a row through all images
            (192, 28, 28, 7, 1, (7, 28)),  # tensor cores, taps as diagonal matrices
            (384, 14, 14, 7, 1, (14, 14)),  # float32 units, a block an image
            (768, 7, 7, 7, 1, (7, 7)),
            (768, 9, 9, 7, 1, (4, 4)),  # neither
        ],
    )
    def test_portable_first_launch(self, channels, height, width, kernel_size, group_width, tile):
        problem = ck.Problem(128, height, width, channels, 4 * channels, kernel_size, group_width)
        name = f"sm80_{'convnext' if group_width == 1 else 'conv_first'}_split_persistent"
        answer = plan(problem, ck.Device.named("h100"), name)
        config = next(row["config"] for row in answer["candidates"] if row["name"] == name)
        assert (config["tile_height"], config["tile_width"]) == tile

    def test_large_tiles_need_the_shared_memory(self):
        problem = ck.Problem(128, 7, 7, 512, 2048)
        answer = plan(problem, ck.Device.named("h100"), "sm80")
        row = next(row for row in answer["candidates"] if row["name"] == answer["chosen"])
        assert row["config"]["hidden_chunk"] == 256 and row["config"]["launches"] == 3
        assert plan(problem, ck.Device.named("a100"), "sm80")["chosen"].endswith("x128")

    @pytest.mark.parametrize(
        ("channels", "side", "kernel_size", "group_width", "variant", "launches", "hidden_in_memory"),
        [
            (96, 56, 7, 1, "sm90_split_c96", 2, False),
            (192, 28, 7, 1, "sm90_split_c192", 2, False),
            (40, 56, 7, 1, "sm90_split_c64", 2, False),
            (384, 14, 7, 1, "sm90_split_linear", 3, True),
            (768, 7, 7, 1, "sm90_split_linear", 3, True),
            (512, 7, 3, 8, "sm90_split_linear", 3, True),
        ],
    )
    def test_hopper_split_path(self, channels, side, kernel_size, group_width, variant, launches, hidden_in_memory):
        problem = ck.Problem(128, side, side, channels, 4 * channels, kernel_size, group_width, activation="gelu")
        answer = plan(problem, ck.Device.named("h100"), "sm90")
        rows = {row["name"]: row for row in answer["candidates"]}
        if variant not in rows:
            pytest.skip("built without the Hopper path")
        assert answer["chosen"] == variant
        config = rows[variant]["config"]
        assert config["launches"] == launches and config["shared_memory"] <= 232448
        bytes_of_x = 128 * side * side * channels * 2
        assert config["workspace"] >= bytes_of_x * (5 if hidden_in_memory else 1)
        assert config["workspace"] < bytes_of_x * (5 if hidden_in_memory else 1) + 1024

    def test_every_row_has_passed_its_gpu_tests(self):
        answer = plan(ck.Problem(128, 28, 28, 192, 768, 7, 1, activation="gelu"), ck.Device.named("h100"))
        rows = {row["name"]: row for row in answer["candidates"]}
        if "sm90_split_c192" not in rows:
            pytest.skip("built without the Hopper path")
        assert answer["chosen"] == "sm90_split_c192"
        assert not [name for name, row in rows.items() if "has not passed" in row["refusal"]]

    @pytest.mark.parametrize(
        ("batch", "channels", "side", "variant"),
        [
            (128, 64, 56, "sm90_conv_first_c64"),
            (128, 128, 28, "sm90_conv_first_c128"),
            (128, 256, 14, "sm90_conv_first_c256"),
            (128, 512, 7, "sm90_split_linear"),
            (1, 64, 56, "sm90_latency_c64"),
            (1, 128, 28, "sm90_latency_c128"),
            (1, 256, 14, "sm90_latency_c256"),
            (4, 64, 56, "sm90_conv_first_c64"),
            (4, 128, 28, "sm90_conv_first_c128"),
            (4, 256, 14, "sm90_split_linear"),
            # Three tiles of 64 pixels on most multiprocessors, two on the others: the split path takes three's time.
            (32, 128, 28, "sm90_conv_first_c128"),
            (8, 96, 56, "sm90_conv_first_c96"),
            (8, 128, 56, "sm90_conv_first_c128"),
        ],
    )
    def test_hopper_variant_that_was_measured_fastest(self, batch, channels, side, variant):
        answer = plan(ck.Problem(batch, side, side, channels, 4 * channels), ck.Device.named("h100"))
        if not any(row["name"] == variant for row in answer["candidates"]):
            pytest.skip("built without the Hopper path")
        assert answer["chosen"] == variant

    def test_unknown_path(self):
        with pytest.raises(RuntimeError, match="CONVFIRST_KERNELS_PATH='sm70' names no path; known: sm80, sm90"):
            with ck.force_path("sm70"):
                pass

    def test_force_path_is_lifted(self):
        with ck.force_path("sm80"):
            assert plan(self.PROBLEM, ck.Device.named("h100"))["path"] == "sm80"
        assert plan(self.PROBLEM, ck.Device.named("h100"))["path"] == ""

    def test_environment_forces_a_path(self):
        code = "import convfirst_kernels as ck; print(ck.explain(ck.Problem(1, 7, 7, 64, 256), 'h100'))"
        environment = {**os.environ, "CONVFIRST_KERNELS_PATH": "sm99"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert "CONVFIRST_KERNELS_PATH='sm99' names no path" in done.stderr

    def test_explain_a_problem(self):
        text = ck.explain(self.PROBLEM, "h100")
        assert text.startswith(
            "C=64 hidden=256 k=3 group_width=8 float16 silu with norm, 128 x 56 x 56; compute capability 90"
        )

    def test_explain_names_unknown_devices(self):
        with pytest.raises(ValueError, match="device='voodoo2' is unknown; accepted: .*h100"):
            ck.explain(self.PROBLEM, "voodoo2")

    def test_problems_of_a_network(self):
        timm = pytest.importorskip("timm")
        model = timm.create_model("convnext_atto")
        before = copy.deepcopy(model.state_dict())
        problems = problems_of(model, (2, 3, 224, 224))
        assert list(problems.values()) == [2, 2, 6, 2]
        assert next(iter(problems)) == ck.Problem(2, 56, 56, 40, 160, 7, 1, "float16", "gelu", True)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_every_portable_problem_is_covered(self):
        """Whatever the tests run, an A100 and an RTX 4090 have a variant for."""
        if not any(row["name"].startswith("sm80") for row in plan(self.PROBLEM, ck.Device.named("a100"))["candidates"]):
            pytest.skip("built without the portable path")
        for case in [*conv_first_cases(), *convnext_cases(), *small_cases()]:
            for name in ("a100", "rtx4090"):
                assert plan(case.problem, ck.Device.named(name))["chosen"], f"{case} on {name}"
