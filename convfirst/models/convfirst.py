"""ConvFirst: residual blocks that start with a grouped convolution and can run as one fused kernel.

The block follows Lavin, "On the Efficiency of ConvNets" (arXiv 2404.03617): 3x3 grouped convolution of group width 8,
1x1 expand, SiLU, 1x1 project, residual. The layout of stages, the initialisation and the layer scale are those of
ConvNeXt (Liu et al., arXiv 2201.03545).

Family at 224x224, 1000 classes, expansion 4, ``norm="layernorm"``; multiply-accumulates of convolutions and linear
layers for one image:

=================  ====================  ==========  ======  ==========
model              widths                depths      GMACs   parameters
=================  ====================  ==========  ======  ==========
convfirst_atto     32/64/128/256         1/1/2/1       0.18       1.31M
convfirst_nano     64/128/256/512        2/3/8/2       1.77      10.36M
convfirst_tiny     64/128/256/512        3/4/18/4      3.27      20.27M
convfirst_small    96/192/384/768        3/4/18/3      7.01      39.99M
convfirst_base     128/256/512/1024      3/4/18/3     12.36      70.37M
=================  ====================  ==========  ======  ==========
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerNorm2d,
    LayerScale2d,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    get_act_layer,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["ConvFirst", "ConvFirstBlock"]

_NORMS = {"layernorm": LayerNorm2d, "batchnorm": nn.BatchNorm2d}
_STEM_STRIDES = {4: (2, 2), 2: (2, 1), 1: (1, 1)}


def _norm_layer(norm: str) -> Callable[[int], nn.Module]:
    if norm not in _NORMS:
        raise ValueError(f"norm={norm!r} is unknown; accepted: {', '.join(map(repr, _NORMS))}")
    return _NORMS[norm]


class ConvFirstBlock(nn.Module):
    """Grouped k x k convolution, norm, 1x1 expand, activation, 1x1 project, layer scale, drop path, residual.

    ``norm="layernorm"`` normalises once, after the grouped convolution. ``norm="batchnorm"`` normalises after each of
    the three convolutions, as the paper does; all three fold into the convolutions for inference. Convolutions that a
    batch norm follows have no bias. The names of the submodules are part of the interface: fused kernels read them.

    Args:
        dim: input and output channels, a multiple of ``group_width``.
        kernel_size: odd side of the grouped convolution.
        group_width: channels of a group.
        expansion: hidden channels are ``expansion * dim``.
        norm: ``"layernorm"`` or ``"batchnorm"``.
        activation: timm's name of the activation between expand and project.
        layer_scale: initial value of the per-channel scale, or None for no layer scale.
        drop_path: probability that a sample's residual branch is dropped in training.

    Raises:
        ValueError: ``dim`` is not a multiple of ``group_width``, ``kernel_size`` is even or ``norm`` is unknown.

    Shapes: (N, dim, H, W) -> (N, dim, H, W), any H and W from 1 up, any floating dtype.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        group_width: int = 8,
        expansion: float = 4,
        norm: str = "layernorm",
        activation: str = "silu",
        layer_scale: float | None = 1e-6,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if dim % group_width:
            raise ValueError(f"dim={dim} is not a multiple of group_width={group_width}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even; accepted: odd sizes")
        norm_layer = _norm_layer(norm)
        batchnorm = norm == "batchnorm"
        hidden = int(dim * expansion)
        self.conv = nn.Conv2d(
            dim, dim, kernel_size, padding=kernel_size // 2, groups=dim // group_width, bias=not batchnorm
        )
        self.norm = norm_layer(dim)
        self.expand = nn.Conv2d(dim, hidden, 1, bias=not batchnorm)
        self.expand_norm = nn.BatchNorm2d(hidden) if batchnorm else nn.Identity()
        self.act = get_act_layer(activation)()
        self.project = nn.Conv2d(hidden, dim, 1, bias=not batchnorm)
        self.project_norm = nn.BatchNorm2d(dim) if batchnorm else nn.Identity()
        self.layer_scale = LayerScale2d(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.norm(self.conv(x))
        x = self.act(self.expand_norm(self.expand(x)))
        x = self.project_norm(self.project(x))
        return self.drop_path(self.layer_scale(x)) + shortcut


class ConvFirstStage(nn.Module):
    """Blocks of one width at one resolution, entered through norm and a 2x2 stride-2 convolution (but for the first).

    Shapes: (N, in_dim, H, W) -> (N, dim, H // 2, W // 2), or (N, dim, H, W) with ``downsample=False``.
    """

    def __init__(self, in_dim: int, dim: int, downsample: bool, drop_path: Sequence[float], norm: str, **block):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = (
            nn.Sequential(_norm_layer(norm)(in_dim), nn.Conv2d(in_dim, dim, 2, stride=2))
            if downsample
            else nn.Identity()
        )
        self.blocks = nn.Sequential(*(ConvFirstBlock(dim, norm=norm, drop_path=rate, **block) for rate in drop_path))

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if not self.grad_checkpointing:
            return self.blocks(x)
        for block in self.blocks:
            x = _checkpoint(block, x)
        return x


def _checkpoint(block: nn.Module, x: Tensor) -> Tensor:
    # torch.compile traces the block once and takes no context function; it needs none.
    context = {} if torch.compiler.is_compiling() else {"context_fn": lambda: (nullcontext(), _statistics_kept(block))}
    return checkpoint(block, x, use_reentrant=False, **context)


@contextmanager
def _statistics_kept(block: nn.Module):
    """Keep batch norms from counting a batch a second time while their block is recomputed for the backward pass."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class ConvFirst(nn.Module):
    """ConvFirst classification network: stem of two 3x3 convolutions, stages of blocks, global pool, norm, linear head.

    Args:
        in_chans: channels of the input image.
        num_classes: outputs of the head; 0 gives pooled, normalised features.
        global_pool: timm's pooling type of the head.
        dims: width of each stage.
        depths: blocks in each stage.
        kernel_size: odd side of the blocks' grouped convolution.
        group_width: channels of a convolution group.
        expansion: ratio of the blocks' hidden width to their width.
        norm: ``"layernorm"`` or ``"batchnorm"``, see `ConvFirstBlock`. The head's norm is a LayerNorm either way.
        activation: timm's name of the activation.
        stem_stride: 4 (both stem convolutions have stride 2), 2 or 1, for small images.
        ls_init_value: initial layer scale, or None for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: drop-path probability of the last block; it rises linearly from 0 in the first.
        head_init_scale: factor on the classifier's initial weights and biases.

    Raises:
        ValueError: ``dims`` and ``depths`` differ in length, or an option is not one of those accepted.

    Shapes: (N, in_chans, H, W) -> (N, num_classes), H and W at least ``stem_stride * 2 ** (len(dims) - 1)``.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 4, 18, 4),
        kernel_size: int = 3,
        group_width: int = 8,
        expansion: float = 4,
        norm: str = "layernorm",
        activation: str = "silu",
        stem_stride: int = 4,
        ls_init_value: float | None = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        head_init_scale: float = 1.0,
    ):
        super().__init__()
        if len(dims) != len(depths):
            raise ValueError(f"dims={tuple(dims)} and depths={tuple(depths)} differ in length")
        if stem_stride not in _STEM_STRIDES:
            raise ValueError(f"stem_stride={stem_stride} is unsupported; accepted: 4, 2, 1")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = _stem(in_chans, dims[0], _STEM_STRIDES[stem_stride], norm, activation)
        block = dict(
            kernel_size=kernel_size,
            group_width=group_width,
            expansion=expansion,
            norm=norm,
            activation=activation,
            layer_scale=ls_init_value,
        )
        drop_path = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.Sequential(
            *(
                ConvFirstStage(dims[max(i - 1, 0)], dim, downsample=i > 0, drop_path=drop_path[i], **block)
                for i, dim in enumerate(dims)
            )
        )
        self.feature_info = [
            dict(num_chs=dim, reduction=stem_stride * 2**i, module=f"stages.{i}") for i, dim in enumerate(dims)
        ]
        self.head = NormMlpClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=LayerNorm2d
        )
        self.apply(_init_weights)
        if num_classes > 0:
            with torch.no_grad():
                self.head.fc.weight.mul_(head_init_scale)
                self.head.fc.bias.mul_(head_init_scale)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns by which timm groups parameters into layers, for layer-wise learning-rate decay."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass of training instead of keeping them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for ``num_classes`` classes (0 removes it)."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages named by ``indices`` (the last n if an int, all if None), as timm's models give them.

        Returns the list of (N, dims[i], H_i, W_i) features, preceded by the last stage's output unless
        ``intermediates_only``. ``norm`` has no effect: the only norm outside the stages follows the pooling.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} is unsupported; accepted: 'NCHW'")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of ``indices``, and the head; return the indices as a list."""
        take, last = feature_take_indices(len(self.stages), indices)
        pruned = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_head or pruned:
            self.num_classes = 0
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.head.reset(0, "", reset_other=True)
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, dims[-1], H', W'), the last stage's output."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, dims[-1], H', W') -> (N, num_classes), or the classifier's input (N, dims[-1]) with ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _stem(in_chans: int, dim: int, strides: tuple[int, int], norm: str, activation: str) -> nn.Sequential:
    conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=norm != "batchnorm")
    norm_layer = _norm_layer(norm)
    return nn.Sequential(
        OrderedDict(
            conv1=conv(in_chans, dim // 2, stride=strides[0]),
            norm1=norm_layer(dim // 2),
            act=get_act_layer(activation)(),
            conv2=conv(dim // 2, dim, stride=strides[1]),
            norm2=norm_layer(dim),
        )
    )


def _init_weights(module: nn.Module) -> None:
    """ConvNeXt's initialisation: truncated normal weights of deviation 0.02, zero biases."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _cfg(**overrides) -> dict:
    return dict(
        url="",
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="stem.conv1",
        classifier="head.fc",
        license="apache-2.0",
        **overrides,
    )


default_cfgs = generate_default_cfgs(
    {f"convfirst_{size}": _cfg() for size in ("atto", "nano", "tiny", "small", "base")}
)


def _create(variant: str, pretrained: bool, kwargs: dict, **architecture) -> ConvFirst:
    return build_model_with_cfg(
        ConvFirst,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **{**architecture, **kwargs},
    )


@register_model
def convfirst_atto(pretrained: bool = False, **kwargs) -> ConvFirst:
    """Smallest of the family, for demonstrations and tests."""
    return _create("convfirst_atto", pretrained, kwargs, dims=(32, 64, 128, 256), depths=(1, 1, 2, 1))


@register_model
def convfirst_nano(pretrained: bool = False, **kwargs) -> ConvFirst:
    return _create("convfirst_nano", pretrained, kwargs, dims=(64, 128, 256, 512), depths=(2, 3, 8, 2))


@register_model
def convfirst_tiny(pretrained: bool = False, **kwargs) -> ConvFirst:
    """Counterpart of ConvNeXt-T."""
    return _create("convfirst_tiny", pretrained, kwargs, dims=(64, 128, 256, 512), depths=(3, 4, 18, 4))


@register_model
def convfirst_small(pretrained: bool = False, **kwargs) -> ConvFirst:
    """Counterpart of ConvNeXt-S."""
    return _create("convfirst_small", pretrained, kwargs, dims=(96, 192, 384, 768), depths=(3, 4, 18, 3))


@register_model
def convfirst_base(pretrained: bool = False, **kwargs) -> ConvFirst:
    """Counterpart of ConvNeXt-B."""
    return _create("convfirst_base", pretrained, kwargs, dims=(128, 256, 512, 1024), depths=(3, 4, 18, 3))
