"""Reads what lies between the residual blocks of known model families (stems, downsampling), and packs its weights."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from convfirst_kernels import patches
from convfirst_kernels.block import pack_vector
from convfirst_kernels.blocks import Unsupported, _activation, _after_affine, _split_norm, affine, fold
from convfirst_kernels.planner import Device

operators = torch.ops.convfirst
# One H200, 64 channels, when one product (below) was not asked for: 7.8 us against 5.2 in two launches at 784 rows,
# 42 against 65 at 100352. In between: a guess.
FUSED_ROWS = 16384
# One H100, us of one launch beside two, their input fresh in L2: 128 to 256 channels 20.9 and 29.1 at 25088 rows, 7.2
# and 6.2 at 1568; 256 to 512 17.1 and 20.0 at 6272, 9.5 and 6.6 at 392; 192 to 384 33.2 and 54.5 at 25088; 384 to 768
# 38.3 and 33.7 at 6272. One H200, 64 to 128 at 100352 rows, beside the fused kernel, which reads x through registers:
# 28.8 and 36.8 in float16, 29.8 and 38.2 in bfloat16.
GEMM_ROWS, GEMM_CHANNELS = 4096, 256
# One H200, 512 channels, us beside PyTorch's: 2.6 and 11.9 for one image, 5.6 and 12.0 for 4, 10.9 and 10.0 for 8.
HEAD_IMAGES = 4


def centred(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, ...] and bias [out] less their means over output channels, which LayerNorm removes; float32."""
    weight = weight.float()
    return weight - weight.mean(0, keepdim=True), bias.float() - bias.float().mean()


@dataclass
class NormedConv:
    """A convolution and the norm after it: a batch norm that folds into it, a layer norm, or none."""

    conv: nn.Conv2d
    batch_norm: nn.Module | None
    layer_norm: nn.LayerNorm | None

    def tensors(self) -> list[Tensor]:
        return _tensors(self.conv, self.batch_norm, self.layer_norm)

    def pack(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight, bias, norm weight and norm bias for the operators' norm, float32; see `patches.stem`."""
        weight, bias = fold(self.conv, self.batch_norm)
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        norm_weight, norm_bias = torch.ones_like(bias), torch.zeros_like(bias)
        if self.layer_norm is None:
            return weight.float(), bias.float(), norm_weight, norm_bias
        norm = self.layer_norm
        norm_weight = norm_weight if norm.weight is None else norm.weight
        norm_bias = norm_bias if norm.bias is None else norm.bias
        return *centred(weight, bias), norm_weight, norm_bias


@dataclass
class StemParts:
    """ConvFirst's stem."""

    first: NormedConv
    activation: str
    second: NormedConv
    least_size = 1

    @property
    def batch_norms(self) -> list[nn.Module]:
        return [part.batch_norm for part in (self.first, self.second) if part.batch_norm is not None]

    @property
    def conv(self) -> nn.Conv2d:
        return self.first.conv

    def tensors(self) -> list[Tensor]:
        return self.first.tensors() + self.second.tensors()

    def uncovered(self, index: int) -> str:
        return _uncovered("stem", 3, self.second.conv.out_channels, index)

    def pack(self, dtype: torch.dtype, absorb: bool = True) -> tuple:
        weight1, bias1, *norm1 = self.first.pack()
        weight2, bias2, *norm2 = self.second.pack()
        mid = weight1.shape[0]
        rows = weight1.permute(0, 2, 3, 1).reshape(mid, 3, 9).to(dtype)  # filter row; column, channel
        rounded = bias1.to(dtype)
        rest = (bias1 - rounded.float()).to(dtype)
        packed = torch.cat([nn.functional.pad(rows, (1, 0)).reshape(mid, 30), rounded[:, None], rest[:, None]], 1)
        layer_norms = self.first.layer_norm, self.second.layer_norm
        return (
            packed.contiguous(), *map(pack_vector, norm1),
            weight2.permute(0, 2, 3, 1).reshape(-1, 9, mid).to(dtype).contiguous(), pack_vector(bias2),
            *map(pack_vector, norm2), self.activation, *(n.eps if n else 0.0 for n in layer_norms),
            layer_norms[0] is not None,
        )  # fmt: skip

    def launch(self, x: Tensor, packed: tuple) -> Tensor:
        return operators.stem(x, *packed)

    def describe(self) -> str:
        channels = self.second.conv.out_channels
        return f"stem of two 3x3 convolutions, C={channels} {self.activation} {_norm_name(self.first)}"


@dataclass
class PatchStemParts:
    """ConvNeXt's stem."""

    part: NormedConv
    least_size = 4

    @property
    def batch_norms(self) -> list[nn.Module]:
        return [] if self.part.batch_norm is None else [self.part.batch_norm]

    @property
    def conv(self) -> nn.Conv2d:
        return self.part.conv

    def tensors(self) -> list[Tensor]:
        return self.part.tensors()

    def uncovered(self, index: int) -> str:
        return _uncovered("patch_stem", 3, self.part.conv.out_channels, index)

    def pack(self, dtype: torch.dtype, absorb: bool = True) -> tuple:
        weight, *vectors = self.part.pack()
        weight = weight.permute(0, 2, 3, 1).reshape(-1, 48).to(dtype).contiguous()
        norm = self.part.layer_norm
        return weight, *map(pack_vector, vectors), norm.eps if norm else 0.0, norm is not None

    def launch(self, x: Tensor, packed: tuple) -> Tensor:
        return operators.patch_stem(x, *packed)

    def describe(self) -> str:
        return f"stem of one 4x4 convolution, C={self.part.conv.out_channels} {_norm_name(self.part)}"


@dataclass
class DownsampleParts:
    """Norm and 2x2 convolution between two stages: one of two kernels, or one kernel and a matrix product by cuBLAS."""

    batch_norm: nn.Module | None
    layer_norm: nn.LayerNorm | None
    conv: nn.Conv2d
    least_size = 2

    @property
    def batch_norms(self) -> list[nn.Module]:
        return [] if self.batch_norm is None else [self.batch_norm]

    def tensors(self) -> list[Tensor]:
        return _tensors(self.conv, self.batch_norm, self.layer_norm)

    def uncovered(self, index: int) -> str:
        return _uncovered("normalised_patches", self.conv.in_channels, 0, index)

    def fused(self, x: Tensor) -> bool:
        """Whether one kernel keeps the matrix and normalises x before it; what `multiplied` takes is not asked.

        It loads the whole matrix first, which few rows don't repay.
        """
        return x.device.type != "cuda" or self._covers(x, FUSED_ROWS, "downsample")

    def multiplied(self, x: Tensor) -> bool:
        """Whether one matrix product computes it, from which the norm is taken out: the faster one where both could."""
        narrow = self.conv.in_channels <= GEMM_CHANNELS
        return narrow and x.device.type == "cuda" and self._covers(x, GEMM_ROWS, "downsample_gemm")

    def _covers(self, x: Tensor, least_rows: int, operator: str) -> bool:
        rows = x.shape[0] * (x.shape[2] // 2) * (x.shape[3] // 2)
        shape = self.conv.in_channels, self.conv.out_channels, x.device.index or 0
        return rows >= least_rows and not _uncovered(operator, *shape)

    def pack(self, dtype: torch.dtype, absorb: bool = True) -> tuple:
        conv = self.conv
        weight = conv.weight.permute(0, 2, 3, 1).reshape(conv.out_channels, -1).float()
        bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
        norm = self.layer_norm
        scale = shift = None
        if norm is not None:
            scale, shift = norm.weight, norm.bias
        elif self.batch_norm is not None:
            scale, shift = affine(self.batch_norm)
        if scale is not None:
            weight, bias = _after_affine(weight, bias, scale.repeat(4), None if shift is None else shift.repeat(4))
        bias, weight = pack_vector(bias), weight.to(dtype).contiguous()
        vectors = patches.product_vectors(weight, bias)
        # The bias of a matrix product by cuBLAS has the product's dtype.
        return weight, bias, bias.to(dtype), norm.eps if norm else 0.0, norm is not None, vectors

    def launch(self, x: Tensor, packed: tuple) -> Tensor:
        weight, bias, rounded, eps, has_norm, vectors = packed
        x = x.contiguous(memory_format=torch.channels_last)
        if self.multiplied(x):
            return operators.downsample_gemm(x, weight, vectors, eps, has_norm)
        if self.fused(x):
            return operators.downsample(x, weight, bias, eps, has_norm)
        rows = torch.addmm(rounded, operators.normalised_patches(x, eps, has_norm), weight.t())
        return rows.view(x.shape[0], x.shape[2] // 2, x.shape[3] // 2, rows.shape[-1]).permute(0, 3, 1, 2)

    def describe(self) -> str:
        name = "layernorm" if self.layer_norm is not None else "batchnorm" if self.batch_norm is not None else "no norm"
        return f"downsampling C={self.conv.in_channels} to {self.conv.out_channels} {name}"


@dataclass
class HeadParts:
    """A classifier's head: average over pixels, layer norm, linear layer."""

    layer_norm: nn.LayerNorm
    linear: nn.Linear
    least_size = 1
    batch_norms = ()

    @property
    def conv(self) -> nn.Linear:
        return self.linear

    def tensors(self) -> list[Tensor]:
        return _tensors(self.linear, None, self.layer_norm)

    def uncovered(self, index: int) -> str:
        return _uncovered("head", self.linear.in_features, self.linear.out_features, index)

    def pack(self, dtype: torch.dtype, absorb: bool = True) -> tuple:
        weight, norm = self.linear.weight.float(), self.layer_norm
        bias = weight.new_zeros(weight.shape[0]) if self.linear.bias is None else self.linear.bias
        if norm.weight is not None:
            weight, bias = _after_affine(weight, bias, norm.weight, norm.bias)
        return weight.to(dtype).contiguous(), pack_vector(bias), norm.eps

    def launch(self, x: Tensor, packed: tuple) -> Tensor:
        return operators.head(x.contiguous(memory_format=torch.channels_last), *packed)

    def describe(self) -> str:
        return f"head C={self.linear.in_features} to {self.linear.out_features}, of at most {HEAD_IMAGES} images"


OutsideParts = StemParts | PatchStemParts | DownsampleParts | HeadParts


def refusal(parts: OutsideParts, x: Tensor, dtype: torch.dtype) -> str | None:
    """Why no kernel computes this on x in this dtype, or None where one does."""
    if any(norm.training for norm in parts.batch_norms):
        return "batch norm in training mode needs the batch's statistics; only evaluation mode folds"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parts.tensors())):
        return "a gradient may be asked for, and the kernels have none"
    if x.dim() != 4 or min(x.shape[2:]) < parts.least_size:
        return f"x has shape {list(x.shape)}; the kernels take images of at least {parts.least_size} pixels a side"
    return unavailable(x.device, dtype) or uncovered(parts, x.device.index or 0)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels do not run on this device or dtype, or None."""
    if device.type != "cuda":
        return f"x is on {device.type}; the kernels run on CUDA devices"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"x is {dtype}; the kernels take torch.float16 and torch.bfloat16"
    return None


def uncovered(parts: OutsideParts, index: int) -> str | None:
    """Why no kernel of a CUDA device has this shape, or None where one does."""
    return parts.uncovered(index) or None


@torch.compiler.assume_constant_result
def _uncovered(*shape) -> str:
    # Dynamo traces through a cache, so the cache must lie inside what it takes for a constant.
    return _uncovered_cached(*shape)


@cache
def _uncovered_cached(operator: str, channels: int, columns: int, index: int) -> str:
    device = Device.of(index)
    return operators.patch_refusal(operator, channels, columns, device.capability, device.max_shared_memory)


def find_outside(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the stems and downsampling layers of every ConvFirst and timm ConvNeXt in the model."""
    found = []
    for name, module in model.named_modules():
        families = {cls.__name__ for cls in type(module).__mro__}
        for family, attribute in _PLACES:
            child = getattr(module, attribute, None)
            if family in families and isinstance(child, nn.Module) and not isinstance(child, nn.Identity):
                found.append((f"{name}.{attribute}" if name else attribute, child))
    return found


_PLACES = (
    ("ConvFirst", "stem"),
    ("ConvNeXt", "stem"),
    ("ConvFirstStage", "downsample"),
    ("ConvNeXtStage", "downsample"),
)


def find_heads(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the pooling, normalising heads of every ConvFirst and timm ConvNeXt in the model."""
    found = []
    for name, module in model.named_modules():
        head = getattr(module, "head", None)
        if {"ConvFirst", "ConvNeXt"} & {cls.__name__ for cls in type(module).__mro__} and _is_head(head):
            found.append((f"{name}.head" if name else "head", head))
    return found


def _is_head(module: nn.Module | None) -> bool:
    return type(module).__name__ == "NormMlpClassifierHead" and isinstance(module.fc, nn.Linear)


def read_head(module: nn.Module) -> HeadParts:
    """The parts of a head.

    Raises:
        Unsupported: it has something that the kernel does not do.
    """
    if not _is_head(module):
        raise Unsupported(f"it is a {type(module).__name__} without a linear layer of its own")
    if module.global_pool.pool_type not in ("avg", "fast", "fastavg"):
        raise Unsupported(f"it pools by {module.global_pool.pool_type!r}; supported is the average")
    if not isinstance(module.pre_logits, nn.Identity):
        raise Unsupported("it has a hidden layer")
    _, norm = _split_norm(module.norm)
    if norm is None:
        raise Unsupported(f"its norm is {type(module.norm).__name__}; supported is LayerNorm")
    return HeadParts(norm, module.fc)


def read_outside(module: nn.Module) -> OutsideParts:
    """The parts of a stem or downsampling layer.

    Raises:
        Unsupported: it has something that no kernel does.
    """
    children = dict(module.named_children())
    if list(children) == ["conv1", "norm1", "act", "conv2", "norm2"]:
        return _read_stem(**children)
    layers = list(children.values())
    if len(layers) == 2 and isinstance(layers[0], nn.Conv2d):
        _check_conv(layers[0], 4, 4, 0)
        _check_image(layers[0])
        return PatchStemParts(NormedConv(layers[0], *_split_norm(layers[1])))
    if len(layers) == 2 and isinstance(layers[1], nn.Conv2d):
        _check_conv(layers[1], 2, 2, 0)
        return DownsampleParts(*_split_norm(layers[0]), layers[1])
    raise Unsupported(f"it consists of {', '.join(type(layer).__name__ for layer in layers)}")


def _read_stem(conv1: nn.Conv2d, norm1: nn.Module, act: nn.Module, conv2: nn.Conv2d, norm2: nn.Module) -> StemParts:
    _check_conv(conv1, 3, 2, 1)
    _check_image(conv1)
    _check_conv(conv2, 3, 2, 1)
    if conv2.out_channels != 2 * conv2.in_channels:
        raise Unsupported(
            f"its convolutions have {conv2.in_channels} and {conv2.out_channels} channels; supported is twice as many"
        )
    parts = StemParts(NormedConv(conv1, *_split_norm(norm1)), _activation(act), NormedConv(conv2, *_split_norm(norm2)))
    if (parts.first.layer_norm is None) != (parts.second.layer_norm is None):
        raise Unsupported("one of its norms is a layer norm and the other is not")
    return parts


def _check_conv(conv: nn.Conv2d, size: int, stride: int, padding: int) -> None:
    found = conv.kernel_size, conv.stride, conv.padding, conv.padding_mode, conv.dilation, conv.groups
    if found != ((size, size), (stride, stride), (padding, padding), "zeros", (1, 1), 1):
        raise Unsupported(
            f"its convolution has kernel size {conv.kernel_size}, stride {conv.stride}, padding {conv.padding} "
            f"({conv.padding_mode}), dilation {conv.dilation}, {conv.groups} groups; supported is {size}x{size} with "
            f"stride {stride}, padding {padding}"
        )


def _check_image(conv: nn.Conv2d) -> None:
    if conv.in_channels != 3:
        raise Unsupported(f"its images have {conv.in_channels} channels; supported are 3")


def _tensors(conv: nn.Conv2d, batch_norm: nn.Module | None, layer_norm: nn.Module | None) -> list[Tensor]:
    found = [t for m in (conv, batch_norm, layer_norm) if m is not None for t in (m.weight, m.bias) if t is not None]
    return found if batch_norm is None else [*found, batch_norm.running_mean, batch_norm.running_var]


def _norm_name(part: NormedConv) -> str:
    return "layernorm" if part.layer_norm is not None else "batchnorm" if part.batch_norm is not None else "no norm"
