"""The staged backward on a CPU: its formulas in float64 against autograd, the weight gradient's operator, errors."""

import pytest
import torch
import torch.nn.functional as F
from cases import Case, inputs

import convfirst_kernels as ck
from convfirst_kernels import backward, reference

conv_weight_gradient = torch.ops.convfirst.conv_weight_gradient
TENSORS = 11
SHAPES = [(32, 3, 8), (32, 5, 16), (24, 7, 1), (16, 7, 16)]


def conv_norm(x, conv_weight, conv_bias, residual, group_width, normalise, eps):
    a = reference.conv(x, conv_weight, conv_bias, group_width)
    if residual is not None:
        a = a + residual
    if not normalise:
        return a, x.new_empty(0)
    centred = a - a.mean(1, keepdim=True)
    rstd = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd.flatten()


def feed_forward_backward(
    a, dy, rstd, expand_weight, expand_bias, project_weight, project_bias, layer_scale, sample_scale, activation
):
    """By autograd through the branch, norm included where rstd is given: n = (v - mean) * rstd at v = a / rstd."""
    with torch.enable_grad():
        names = expand_weight, expand_bias, project_weight, project_bias, layer_scale
        leaves = [None if t is None else t.detach().requires_grad_() for t in names]
        hidden, channels = expand_weight.shape
        if leaves[1] is None:
            leaves[1] = a.new_zeros(hidden, requires_grad=True)
        if leaves[3] is None:
            leaves[3] = a.new_zeros(channels, requires_grad=True)
        values = a.permute(0, 2, 3, 1).detach()
        if rstd is not None:
            values = values / rstd.view(values.shape[:3])[..., None]
        values.requires_grad_()
        n = values
        if rstd is not None:  # eps is in rstd already
            centred = values - values.mean(-1, keepdim=True)
            eps = rstd.view(values.shape[:3])[..., None] ** -2 - centred.square().mean(-1, keepdim=True)
            n = centred * (centred.square().mean(-1, keepdim=True) + eps.detach()).rsqrt()
        branch = F.linear(reference._ACTIVATIONS[activation](F.linear(n, *leaves[:2])), *leaves[2:4])
        if layer_scale is not None:
            branch = branch * leaves[4]
        if sample_scale is not None:
            branch = branch * sample_scale[:, None, None, None]
        wanted = [values, *(t for t in leaves if t is not None)]
        da, *others = torch.autograd.grad(branch, wanted, dy.permute(0, 2, 3, 1))
    return da.reshape(-1, channels), *others, *([a.new_empty(0)] if layer_scale is None else [])


STAGES = backward.Stages(conv_norm, feed_forward_backward, backward.conv_weight_gradient)
OPTIONS = [
    {},
    {"sample_scale": True},
    {"biases": False, "sample_scale": True},
    {"affine": False},
    {"layer_scale": False, "biases": False},
    {"affine": False, "biases": False, "layer_scale": False},
]


def arguments_of(shape, options, norm=True, activation="silu") -> list:
    channels, kernel_size, group_width = shape
    problem = ck.Problem(
        3, 5, 4, channels, 4 * channels, kernel_size, group_width, activation=activation, has_norm=norm
    )
    case = Case(problem, **options)
    return [a.double() if isinstance(a, torch.Tensor) else a for a in inputs(case, 1, device="cpu")]


@pytest.mark.parametrize("activation", ck.ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_stages_compute_the_references_gradients(shape, options, norm, activation):
    arguments = arguments_of(shape, options, norm, activation)
    leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    tensors = [a for a in leaves if isinstance(a, torch.Tensor)]
    grad = torch.randn_like(leaves[0]).contiguous(memory_format=torch.channels_last)
    theirs = torch.autograd.grad(reference.conv_first_block(*leaves), tensors, grad)
    with torch.no_grad():
        ours = backward.staged_backward(STAGES, grad, *arguments, [True] * TENSORS)
    found = [g for g, a in zip(ours, arguments, strict=False) if a is not None]
    for gradient, expected, tensor in zip(found, theirs, tensors, strict=True):
        assert gradient.shape == tensor.shape and gradient.dtype == tensor.dtype
        torch.testing.assert_close(gradient, expected)
    assert all(g.shape == (0,) for g, a in zip(ours, arguments, strict=False) if a is None)


@pytest.mark.parametrize("wanted", range(TENSORS))
def test_each_gradient_alone(wanted):
    arguments = arguments_of(SHAPES[0], {"sample_scale": True})
    grad = torch.randn_like(arguments[0]).contiguous(memory_format=torch.channels_last)
    everything = backward.staged_backward(STAGES, grad, *arguments, [True] * TENSORS)
    alone = backward.staged_backward(STAGES, grad, *arguments, [i == wanted for i in range(TENSORS)])
    assert [g.numel() > 0 for g in alone] == [i == wanted for i in range(TENSORS)]
    torch.testing.assert_close(alone[wanted], everything[wanted])
    fakes = torch.ops.convfirst.conv_first_block_backward(grad, *arguments, [i == wanted for i in range(TENSORS)])
    assert [(g.shape, g.dtype, g.stride()) for g in alone] == [(g.shape, g.dtype, g.stride()) for g in fakes]


def test_nothing_is_computed_where_nothing_is_wanted():
    arguments = arguments_of(SHAPES[0], {})
    nothing = backward.Stages(None, None, None)
    assert all(g.numel() == 0 for g in backward.staged_backward(nothing, arguments[0], *arguments, [False] * TENSORS))


@pytest.mark.parametrize(("channels", "kernel_size", "group_width"), SHAPES)
def test_transposed_filter(channels, kernel_size, group_width):
    x = torch.randn(2, channels, 6, 5, dtype=torch.float64, requires_grad=True)
    filter = torch.randn(kernel_size**2, channels, group_width, dtype=torch.float64)
    upstream = torch.randn_like(x)
    (expected,) = torch.autograd.grad(reference.conv(x, filter, None, group_width), x, upstream)
    transposed = backward.transpose_filter(filter)
    torch.testing.assert_close(reference.conv(upstream, transposed, None, group_width), expected)
    assert torch.equal(backward.transpose_filter(transposed), filter)


class TestWhoComputesGradients:
    """On a CPU no kernel does; as on a GPU whose forward is covered."""

    @pytest.fixture(autouse=True)
    def forward_covered(self, monkeypatch):
        monkeypatch.setattr("convfirst_kernels.block.refusal", lambda *shape: None)
        monkeypatch.setattr("convfirst_kernels.block._logged", set())

    @pytest.fixture
    def call(self):
        x, *weights, sample_scale = arguments_of(SHAPES[0], {"sample_scale": True})[:TENSORS]
        natural = reference.unpack_conv_weight(weights[0]), *weights[1:]
        return lambda **options: ck.conv_first_block(x, *natural, sample_scale, **options), x, sample_scale

    def test_required_kernels_refuse_a_gradient_by_pytorch(self, call):
        block, x, _ = call
        block(kernels="required")
        x.requires_grad_()
        with pytest.raises(RuntimeError, match="kernels='required', but a gradient would be PyTorch's: x is on cpu"):
            block(kernels="required")
        with torch.no_grad():
            block(kernels="required")

    def test_auto_logs_it_once(self, call, caplog):
        block, x, _ = call
        x.requires_grad_()
        for _ in range(2):
            block()
        messages = [record.message for record in caplog.records]
        assert len(messages) == 1 and "a gradient is computed by the PyTorch reference: x is on cpu" in messages[0]

    def test_factors_of_drop_path_have_no_kernel(self, call, monkeypatch):
        block, x, sample_scale = call
        monkeypatch.setattr("convfirst_kernels.backward.refusal", lambda *shape: None)
        x.requires_grad_()
        block(kernels="required")
        sample_scale.requires_grad_()
        with pytest.raises(RuntimeError, match="sample_scale, drop path's factors, requires one"):
            block(kernels="required")


def images(*shape, dtype=torch.float16) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float32).to(dtype).contiguous(memory_format=torch.channels_last)


class TestConvWeightGradient:
    @pytest.mark.parametrize(("channels", "kernel_size", "group_width"), SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_is_autograds(self, channels, kernel_size, group_width, dtype):
        da, x = (images(2, channels, 6, 5, dtype=dtype) for _ in range(2))
        filter = torch.zeros(kernel_size**2, channels, group_width, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(channels, dtype=torch.float64, requires_grad=True)
        y = reference.conv(x.double(), filter, bias, group_width)
        expected = torch.autograd.grad(y, (filter, bias), da.double())
        ours = conv_weight_gradient(da, x, kernel_size, group_width)
        for gradient, truth in zip(ours, expected, strict=True):
            assert gradient.dtype == torch.promote_types(dtype, torch.float32)
            torch.testing.assert_close(gradient.double(), truth, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_opcheck(self, dtype):
        da, x = (images(2, 16, 4, 3, dtype=dtype) for _ in range(2))
        torch.library.opcheck(conv_weight_gradient.default, (da, x, 3, 8))

    @pytest.mark.parametrize(
        ("da", "x", "options", "message"),
        [
            (
                images(2, 16, 4, 3),
                images(2, 16, 4, 4),
                (3, 8),
                r"da has shape \[2, 16, 4, 3\]; expected \[2, 16, 4, 4\]",
            ),
            (images(2, 16, 4, 3, dtype=torch.bfloat16), images(2, 16, 4, 3), (3, 8), "da is torch.bfloat16; expected"),
            (
                images(2, 16, 4, 3).contiguous(),
                images(2, 16, 4, 3),
                (3, 8),
                "da of shape .* expected dense channels_last",
            ),
            (images(2, 12, 4, 3), images(2, 12, 4, 3), (3, 1), "x has 12 channels; supported are multiples of 8"),
            (images(2, 16, 4, 3), images(2, 16, 4, 3), (4, 8), "kernel_size is 4; supported are 3, 5 and 7"),
            (
                images(2, 16, 4, 3),
                images(2, 16, 4, 3),
                (3, 4),
                "group_width is 4; supported are 1 .depthwise., 8 and 16",
            ),
            (images(2, 24, 4, 3), images(2, 24, 4, 3), (3, 16), "group_width 16 does not divide the 24 channels"),
        ],
    )
    def test_refusals(self, da, x, options, message):
        with pytest.raises(RuntimeError, match="conv_weight_gradient: " + message):
            conv_weight_gradient(da, x, *options)
