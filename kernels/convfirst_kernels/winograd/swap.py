"""Winograd's or direct convolution in place of a model's 3x3 convolutions of stride 1, where measured to be faster."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from convfirst_kernels.block import compute_dtype, state_of
from convfirst_kernels.blocks import _activation, fold
from convfirst_kernels.direct import convolution as direct
from convfirst_kernels.winograd import kernels, measured

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class WinogradForward:
    """Stands in for a convolution's ``forward``: Winograd or direct where measured to be faster, else its own code.

    It lives in the module's ``__dict__``, where an attribute of that name hides the class's method. Converted weights
    are kept until they change. Where a gradient may be asked for, and in a program of torch.compile whose sizes are
    symbolic, the convolution runs its own code. With the batch norm in evaluation mode and the activation that follow
    it, it is the three of them as one kernel, for frozen weights alone.
    """

    def __init__(
        self, conv: nn.Conv2d, frozen: bool, norm: nn.Module | None = None, activation: nn.Module | None = None
    ):
        self.conv = conv
        self.frozen = frozen
        self.norm = norm
        self.activation = activation
        self.converted: dict[tuple, tuple] = {}
        weight = conv.weight
        # Now, so that no later stream finds it in progress, and since a traced program can't keep what it converts. Not
        # in float32 where weights may change: they may be called under autocast alone.
        if weight.device.type == "cuda" and (frozen or weight.dtype != torch.float32):
            for algorithm in _algorithms(conv, [weight.dtype]):
                self.operands(algorithm, weight.dtype, weight.device)

    def __call__(self, input: Tensor) -> Tensor:  # named as nn.Conv2d's
        conv, dtype, frozen = self.conv, compute_dtype(input), self.frozen
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (input, *conv.parameters())):
            self.forget()  # an update is near, and fused optimisers leave version counters alone
            return self._own(input)
        algorithm = choose(conv, input, dtype)
        # A traced program would transform the filters at each call, which measurements leave out.
        if algorithm is None or (algorithm != "direct" and torch.compiler.is_compiling() and not frozen):
            return self._own(input)
        x, (filter, bias) = input.to(dtype), self.operands(algorithm, dtype, input.device)
        activation = "none" if self.activation is None else _activation(self.activation)
        if algorithm == "direct":
            geometry = (*conv.stride, *conv.padding, *conv.dilation)
            return torch.ops.convfirst.direct_conv2d(x, filter, bias, *geometry, activation)
        shape = (conv.out_channels, conv.padding[0])
        return torch.ops.convfirst.winograd_conv2d_filtered(x, filter, bias, *shape, algorithm, activation, "")

    def _own(self, input: Tensor) -> Tensor:
        y = type(self.conv).forward(self.conv, input)
        for module in (self.norm, self.activation):
            y = y if module is None else module(y)
        return y

    def describe(self) -> str:
        followers = [type(module).__name__ for module in (self.norm, self.activation) if module is not None]
        return ", ".join([f"{self.conv.in_channels} -> {self.conv.out_channels} channels", *followers])

    def forget(self) -> None:
        if not self.frozen:
            self.converted = {}

    def operands(self, algorithm: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Filter and bias as the algorithm takes them for x of that dtype; kept while the weights hold good."""
        compiling = torch.compiler.is_compiling()
        kept, state = self.converted.get((algorithm, dtype, device), (None, None))
        # A traced program can't look at version counters: only weights declared frozen outlive its calls.
        if kept is not None and (self.frozen or (not compiling and state == self._state())):
            return kept
        if compiling:
            return _converted(self.conv, self.norm, algorithm, dtype)
        with torch.inference_mode(False), torch.no_grad():
            made = tuple(map(_aligned, _converted(self.conv, self.norm, algorithm, dtype)))
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():  # what is captured has not run yet
            self.converted[algorithm, dtype, device] = (made, self._state())
        return made

    def _state(self) -> tuple:
        return tuple(state_of(tensor) for tensor in self.conv.parameters())

    def __getstate__(self) -> dict:
        return {**self.__dict__, "converted": {}}


def _converted(
    conv: nn.Conv2d, norm: nn.Module | None, algorithm: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    weight, bias = fold(conv, norm)
    filter = weight.detach().to(dtype)
    if algorithm == "direct":
        filter = filter.contiguous(memory_format=torch.channels_last)
    else:
        filter = torch.ops.convfirst.winograd_filter(filter, algorithm, False)
    return filter, None if bias is None else bias.detach().float()


def _aligned(tensor: Tensor | None) -> Tensor | None:
    """As the kernels take it: parameters that are views of one buffer may lie at any address."""
    return tensor if tensor is None or tensor.data_ptr() % 16 == 0 else tensor.clone()


def read_convolution(module: nn.Module) -> str | None:
    """Why a 3x3 convolution of stride 1 can't run as Winograd's, "" where it can; None of any other module."""
    if type(module) is not nn.Conv2d or module.kernel_size != (3, 3) or module.stride != (1, 1):
        return None
    if module.groups != 1:
        return f"groups={module.groups}; the kernels convolve all channels with all"
    if module.dilation != (1, 1):
        return f"dilation={module.dilation}; supported is 1"
    if module.padding_mode != "zeros" or module.padding not in ((0, 0), (1, 1), (2, 2)):
        return f"padding={module.padding!r} of {module.padding_mode}; supported are 0, 1 and 2 zeros"
    weight = module.weight
    if weight.device.type == "cuda" and torch.cuda.get_device_capability(weight.device) != measured.CAPABILITY:
        return "only GPUs of compute capability 9.0 were measured"
    # In float32 autocast may ask for others.
    dtypes = _DTYPES if weight.dtype == torch.float32 else (weight.dtype,)
    if not _algorithms(module, dtypes):
        channels = f"{module.in_channels} -> {module.out_channels} channels"
        return f"{channels} in {_name(weight.dtype)} were not measured to be faster than cuDNN"
    return ""


def _speaks_for(row: measured.Row, conv: nn.Conv2d) -> bool:
    """Whether the row is of a gain, with about as many channels."""
    pairs = ((row.channels, conv.in_channels), (row.outputs, conv.out_channels))
    near = all(max(pair) <= 2 * min(pair) for pair in pairs)
    return near and measured.gains(row)


def find_convolutions(model: nn.Module, taken: Sequence[str]) -> list[tuple[str, nn.Conv2d, str, str | None]]:
    """(name, module, shape, None or why not) of a model's dense 3x3 convolutions of stride 1, but for those of modules
    named in ``taken``. None where nothing was measured."""
    if not measured.table():
        return []
    inside = tuple(f"{name}." for name in taken)
    found = []
    for name, module in model.named_modules():
        reason = None if name.startswith(inside) or name in taken else read_convolution(module)
        if reason is not None:
            found.append((name, module, f"{module.in_channels} -> {module.out_channels} channels", reason or None))
    return found


def choose(conv: nn.Conv2d, x: Tensor, dtype: torch.dtype) -> str | None:
    """The algorithm that was measured to be faster than cuDNN on this call, or None: the convolution's own code."""
    if x.device.type != "cuda" or x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    if dtype == torch.float32 and _tf32_allowed():
        return None  # cuDNN then takes TF32 on tensor cores, which is faster, and what the user allows
    if torch.cuda.get_device_capability(x.device) != measured.CAPABILITY or x.device != conv.weight.device:
        return None
    if torch.compiler.is_compiling():
        if not all(map(_is_static, x.shape)):
            return None  # what was measured is of sizes
    elif x.data_ptr() % 16 != 0:
        return None
    grown = 2 * conv.padding[0] - 2
    batch, channels, height, width = map(operator.index, x.shape)
    algorithm = _faster(dtype, batch, height + grown, width + grown, channels, conv.out_channels)
    if algorithm is None:
        return None
    if algorithm == "direct":
        refused = direct.refusal(x, dtype)
    else:
        refused = kernels.refusal(x.to(dtype), conv.out_channels, conv.padding[0], algorithm)
    return algorithm if refused is None else None


@torch.compiler.assume_constant_result  # Dynamo can't read it
def _tf32_allowed() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def _is_static(size: int) -> bool:
    """Whether a traced program is of this size alone: then each of these comparisons has its answer."""
    known = statically_known_true
    return all(known(size < bound) or known(size >= bound) for bound in (4, 16, 64, 256, 1024, 4096))


@torch.compiler.assume_constant_result
def _faster(dtype: torch.dtype, batch: int, height: int, width: int, channels: int, outputs: int) -> str | None:
    return measured.faster(_name(dtype), batch, height, width, channels, outputs)


def _algorithms(conv: nn.Conv2d, dtypes: Sequence[torch.dtype]) -> set[str]:
    """Those that calls in these dtypes may choose."""
    names = [_name(dtype) for dtype in dtypes]
    return {row.best()[1] for row in measured.table() if row.dtype in names and _speaks_for(row, conv)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
