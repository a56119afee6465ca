"""Reads the residual blocks of known model families into one description, without importing those families."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convfirst_kernels.block import BlockWeights, pack_block, pack_matrix

_LAYER_NORMS = {"LayerNorm", "LayerNorm2d", "LayerNormFp32", "LayerNorm2dFp32"}
_BATCH_NORMS = {"BatchNorm2d", "SyncBatchNorm"}
_MOST_BIAS = 1e4  # of a projection before its scale: float16 holds it


class Unsupported(Exception):
    """A block can't be fused; the message says why."""


@dataclass
class Parts:
    """The modules of one conv-first block; a batch norm stands beside the convolution that it follows."""

    conv: nn.Conv2d
    conv_norm: nn.Module | None  # batch norm
    norm: nn.LayerNorm | None
    expand: nn.Module  # 1x1 convolution or linear layer
    expand_norm: nn.Module | None  # batch norm
    activation: str
    project: nn.Module
    project_norm: nn.Module | None  # batch norm
    scale: Tensor | None  # layer scale [C]
    drop_path: nn.Module

    @property
    def batch_norms(self) -> list[nn.Module]:
        return [norm for norm in (self.conv_norm, self.expand_norm, self.project_norm) if norm is not None]

    def tensors(self) -> list[Tensor]:
        """Every parameter and buffer that the packed weights come from."""
        modules = [self.conv, self.norm, self.expand, self.project, *self.batch_norms]
        found = [t for module in modules if module is not None for t in (module.weight, module.bias) if t is not None]
        found += [t for norm in self.batch_norms for t in (norm.running_mean, norm.running_var)]
        return found if self.scale is None else [*found, self.scale]

    def pack(self, dtype: torch.dtype, absorb: bool = False) -> BlockWeights:
        """The operator's weights for inputs of ``dtype``, batch norms folded in float32.

        Differentiable without ``absorb``, which is for inference. It multiplies the layer norm's affine part and the
        layer scale into the matrices beside them, in float32, so that the kernel is spared a pass over its registers
        for each. A batch norm after the projection is no such factor: it becomes a layer scale of its own. What a
        weight loses by rounding is the same in every pixel and image, so no average over them makes it less, and
        weights of 16 bits that a norm's factors leave alone lose nothing. The convolution's norm takes its mean out
        before anything is rounded, as the convolution's bias; its factor goes into the expansion.
        """
        conv, conv_bias = self.conv.weight, self.conv.bias
        expand, expand_bias = fold(self.expand, self.expand_norm)
        project, project_bias, scale = self.project.weight, self.project.bias, self.scale
        norm = self.norm
        norm_weight, norm_bias = (norm.weight, norm.bias) if norm else (None, None)
        if self.conv_norm is not None:
            mean = self.conv_norm.running_mean.float()
            conv_bias = -mean if conv_bias is None else conv_bias.float() - mean
            expand, expand_bias = _after_affine(expand, expand_bias, affine(self.conv_norm)[0], self.conv_norm.bias)
        if absorb and norm_weight is not None:
            expand, expand_bias = _after_affine(expand, expand_bias, norm_weight, norm_bias)
            norm_weight = norm_bias = None
        if absorb and self.project_norm is not None:
            project, project_bias, scale = _behind(self.project, self.project_norm, scale)
        elif self.project_norm is not None:
            project, project_bias = fold(self.project, self.project_norm)
        elif absorb and scale is not None:
            project = project.flatten(1).float() * scale.float()[:, None]
            project_bias = None if project_bias is None else project_bias.float() * scale.float()
            scale = None
        return pack_block(
            conv, conv_bias, norm_weight, norm_bias, expand, expand_bias, project, project_bias, scale,
            activation=self.activation, eps=norm.eps if norm else 0.0, has_norm=norm is not None, dtype=dtype,
        )  # fmt: skip

    def describe(self) -> str:
        """One line for reports."""
        norm = "layernorm" if self.norm is not None else "batchnorm" if self.batch_norms else "no norm"
        size, width = self.conv.kernel_size[0], self.conv.in_channels // self.conv.groups
        hidden = self.expand.weight.shape[0]
        return f"C={self.conv.in_channels} hidden={hidden} k={size} group_width={width} {self.activation} {norm}"


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Factor and shift of each channel by a batch norm in evaluation mode, float32."""
    factor = (norm.running_var.float() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.float()
    shift = -norm.running_mean.float() * factor
    return factor, shift if norm.bias is None else shift + norm.bias.float()


def fold(linear: nn.Module, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution or linear layer with the batch norm in evaluation mode that follows it."""
    weight, bias = linear.weight, linear.bias
    if norm is None:
        return weight, bias
    factor, shift = affine(norm)
    if bias is not None:
        shift = shift + bias.float() * factor
    return weight.float() * factor.reshape(-1, *[1] * (weight.dim() - 1)), shift


def _behind(linear: nn.Module, norm: nn.Module, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias of a linear layer, and the factors of its result, that a batch norm and then ``scale`` make."""
    factor, shift = affine(norm)
    if linear.bias is not None:
        shift = shift + linear.bias.float() * factor
    # The shift comes before the factor; where it is most of the channel, a factor as small would make it too large.
    least = shift.abs() / _MOST_BIAS
    behind = torch.where(factor.abs() >= least, factor, least)
    behind = behind.masked_fill(behind == 0, 1.0)
    weight = linear.weight.flatten(1).float() * (factor / behind)[:, None]
    return weight, shift / behind, behind if scale is None else behind * scale.float()


def _after_affine(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the linear layer that takes ``v`` where ``weight, bias`` took ``v * scale + shift``."""
    matrix = pack_matrix(weight, torch.float32)
    if shift is not None:
        moved = (matrix * shift.float()).sum(1)  # autocast would round a product of matrices
        bias = moved if bias is None else bias.float() + moved
    return matrix * scale.float(), bias


def read_block(module: nn.Module) -> Parts | None:
    """The parts of a block of a known family; None for any other module.

    Raises:
        Unsupported: it is such a block, and has something that no kernel does.
    """
    names = {cls.__name__ for cls in type(module).__mro__}
    if "ConvFirstBlock" in names:
        return _read_conv_first(module)
    if "ConvNeXtBlock" in names and hasattr(module, "conv_dw"):
        return _read_convnext(module)
    return None


def _read_conv_first(block: nn.Module) -> Parts:
    conv_norm, norm = _split_norm(block.norm)
    scale = None if isinstance(block.layer_scale, nn.Identity) else block.layer_scale.gamma
    return _checked(
        Parts(
            block.conv, conv_norm, norm, block.expand, _batch_norm("expand_norm", block.expand_norm),
            _activation(block.act), block.project, _batch_norm("project_norm", block.project_norm), scale,
            block.drop_path,
        ),
    )  # fmt: skip


def _read_convnext(block: nn.Module) -> Parts:
    if not isinstance(block.shortcut, nn.Identity):
        raise Unsupported("it changes width or resolution: its shortcut is not the identity")
    mlp = block.mlp
    if type(mlp).__name__ != "Mlp":
        raise Unsupported(f"mlp is {type(mlp).__name__}; supported is Mlp")
    if not isinstance(mlp.norm, nn.Identity):
        raise Unsupported(f"mlp.norm is {type(mlp.norm).__name__}; supported is none")
    if mlp.drop1.p or mlp.drop2.p:
        raise Unsupported("mlp has dropout")
    conv_norm, norm = _split_norm(block.norm)
    return _checked(
        Parts(
            block.conv_dw, conv_norm, norm, mlp.fc1, None, _activation(mlp.act), mlp.fc2, None, block.gamma,
            block.drop_path,
        ),
    )  # fmt: skip


def _split_norm(norm: nn.Module) -> tuple[nn.Module | None, nn.LayerNorm | None]:
    """A norm after the convolution as (batch norm, layer norm), at most one of them there."""
    if type(norm).__name__ in _LAYER_NORMS and isinstance(norm, nn.LayerNorm):
        return None, norm
    return _batch_norm("norm", norm), None


def _batch_norm(name: str, norm: nn.Module) -> nn.Module | None:
    if isinstance(norm, nn.Identity):
        return None
    if type(norm).__name__ not in _BATCH_NORMS:
        raise Unsupported(f"{name} is {type(norm).__name__}; supported are LayerNorm, LayerNorm2d and BatchNorm2d")
    if norm.running_mean is None:
        raise Unsupported(f"{name} keeps no running statistics, so it can't be folded")
    return norm


def _activation(act: nn.Module) -> str:
    name = type(act).__name__.lower()
    name = {"swish": "silu"}.get(name, name)
    if name not in ("relu", "silu", "gelu"):
        raise Unsupported(f"activation is {type(act).__name__}; supported are ReLU, SiLU and GELU")
    if getattr(act, "approximate", "none") != "none":
        raise Unsupported(f"activation is GELU(approximate={act.approximate!r}); supported is the exact GELU")
    return name


def _checked(parts: Parts) -> Parts:
    conv = parts.conv
    side = conv.kernel_size[0]
    width = conv.in_channels // conv.groups
    if conv.in_channels != conv.out_channels:
        raise Unsupported(f"its convolution goes from {conv.in_channels} to {conv.out_channels} channels")
    if conv.stride != (1, 1):
        raise Unsupported(f"its convolution has stride {conv.stride}; supported is 1")
    if conv.dilation != (1, 1):
        raise Unsupported(f"its convolution has dilation {conv.dilation}; supported is 1")
    if conv.kernel_size not in ((3, 3), (5, 5), (7, 7)):
        raise Unsupported(f"its convolution has kernel size {conv.kernel_size}; supported are 3, 5 and 7")
    if conv.padding != (side // 2, side // 2) or conv.padding_mode != "zeros":
        raise Unsupported(f"its convolution has padding {conv.padding} ({conv.padding_mode}); supported is {side // 2}")
    if width not in (1, 8, 16):
        raise Unsupported(f"its convolution has group width {width}; supported are 1, 8 and 16")
    if conv.in_channels % 8:
        raise Unsupported(f"it has {conv.in_channels} channels; supported are multiples of 8")
    return parts


def check_hooks(block: nn.Module) -> None:
    """Raise Unsupported where a module inside the block has forward hooks: a fused block would not run them."""
    for name, child in block.named_modules():
        if name and (child._forward_hooks or child._forward_pre_hooks):
            raise Unsupported(f"{name} has forward hooks, which a fused block would not run")
