"""What the tests of stems and downsampling run; how a result is judged is in cases.py."""

from dataclasses import dataclass, replace

import torch
from cases import guarded
from torch import Tensor, nn

from convfirst_kernels.outside import OutsideParts, read_outside


@dataclass(frozen=True)
class Patch:
    """A stem or downsampling layer and its input."""

    kind: str  # "stem", "patch_stem", "downsample"
    channels: int  # of the output; of the input for downsampling
    batch: int
    height: int
    width: int
    dtype: str = "float16"
    norm: str = "layernorm"
    activation: str = "silu"
    layout: str = "channels_last"  # of x; "contiguous" for images
    mean: float = 0.3  # of x, whose standard deviation is 1

    def __str__(self) -> str:
        return "-".join(map(str, vars(self).values()))


def module(case: Patch, seed: int) -> nn.Module:
    """The PyTorch module in evaluation mode, its values exact in the case's dtype; float64."""
    torch.manual_seed(seed)
    norm = {"layernorm": LayerNorm2d, "batchnorm": nn.BatchNorm2d}[case.norm]
    c, bias = case.channels, case.norm == "layernorm"
    if case.kind == "stem":
        act = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}[case.activation]()
        layers = dict(
            conv1=nn.Conv2d(3, c // 2, 3, 2, 1, bias=bias), norm1=norm(c // 2), act=act,
            conv2=nn.Conv2d(c // 2, c, 3, 2, 1, bias=bias), norm2=norm(c),
        )  # fmt: skip
    elif case.kind == "patch_stem":
        layers = dict(conv=nn.Conv2d(3, c, 4, 4), norm=norm(c))
    else:
        layers = dict(norm=norm(c), conv=nn.Conv2d(c, 2 * c, 2, 2))
    network = nn.Sequential()
    for name, layer in layers.items():
        network.add_module(name, layer)
    with torch.no_grad():
        for layer in layers.values():
            if isinstance(layer, nn.Conv2d):
                layer.weight.normal_(0, layer.weight[0].numel() ** -0.5)
            if getattr(layer, "bias", None) is not None:
                layer.bias.normal_(0, 0.2)
            if isinstance(layer, (nn.LayerNorm, nn.BatchNorm2d)):
                layer.weight.normal_(1, 0.2)
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.2)
                layer.running_var.uniform_(0.5, 2)
    return network.to(getattr(torch, case.dtype)).double().eval().requires_grad_(False)


class LayerNorm2d(nn.LayerNorm):
    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def patch_inputs(case: Patch, seed: int, device: str = "cuda", guard: int = 4096) -> Tensor:
    """x between NaNs on either side, so that a read past its ends shows."""
    generator = torch.Generator(device).manual_seed(seed)
    channels = case.channels if case.kind == "downsample" else 3
    x = guarded(case.batch, channels, case.height, case.width, getattr(torch, case.dtype), device, guard)
    if case.layout == "contiguous":
        x = torch.full_like(x._base, float("nan"))[guard : guard + x.numel()].view(x.shape)
    return x.copy_(torch.randn(x.shape, generator=generator, device=device) + case.mean)


def parts_of(network: nn.Module, dtype: torch.dtype) -> tuple[OutsideParts, tuple]:
    """The description of a float64 module as it would be in ``dtype``, and its packed weights."""
    parts = read_outside(network.to(dtype))
    return parts, parts.pack(dtype)


def run(case: Patch, parts: OutsideParts, packed: tuple, x: Tensor, one_launch: bool = False) -> Tensor:
    """What `accelerate` would run, or of downsampling the kernel that does it in one launch, whatever the size."""
    if case.kind == "downsample" and one_launch:
        return torch.ops.convfirst.downsample(x, *packed[:2], *packed[3:5])
    return parts.launch(x, packed)


def multiply(parts: OutsideParts, packed: tuple, x: Tensor, tile: int = 0) -> Tensor:
    """A downsampling layer as one matrix product; tile as `patches.downsample_gemm` says."""
    weight, _, _, eps, has_norm, vectors = packed
    return torch.ops.convfirst.downsample_gemm(x, weight, vectors, eps, has_norm, tile)


def as_one_product() -> list[Patch]:
    """Widths and sizes on either side of the tiles', of the kernel that takes the norm out of the product."""
    cases = []
    for i, channels in enumerate((64, 128, 192, 256, 384, 768)):
        for j, (height, width) in enumerate([(2, 2), (3, 7), (14, 14), (29, 30), (56, 56), (16, 130)]):
            k = i + j
            cases.append(
                Patch(
                    "downsample", channels, (1, 3, 2)[k % 3], height, width, ("float16", "bfloat16")[k % 2],
                    ("layernorm", "batchnorm")[k % 5 == 3], mean=(0.3, -3.0, 30.0)[k % 3],
                )
            )  # fmt: skip
    return cases


def in_one_launch() -> list[Patch]:
    """The downsampling layers of `patch_cases` that one kernel does."""
    return [case for case in patch_cases() if case.kind == "downsample" and case.channels in (32, 64, 96)]


def patch_cases() -> list[Patch]:
    """Every width, with sizes on either side of the tiles'."""
    cases = []
    sizes = [(1, 3), (5, 4), (32, 32), (33, 40), (31, 8), (64, 57), (224, 224), (97, 200)]
    for i, dim in enumerate((32, 64, 96, 128)):
        for j, (height, width) in enumerate(sizes):
            k = i + j
            cases.append(
                Patch(
                    "stem", dim, (1, 3, 2)[k % 3], height, width, ("float16", "bfloat16")[k % 2],
                    ("layernorm", "layernorm", "batchnorm")[k % 3], ("silu", "gelu", "relu")[j % 3],
                    ("channels_last", "contiguous")[k // 2 % 2],
                )
            )  # fmt: skip
    for i, dim in enumerate((48, 64, 80, 96, 128)):
        for j, (height, width) in enumerate([(4, 4), (7, 22), (224, 224), (33, 57), (64, 36)]):
            k = i + j
            cases.append(
                Patch(
                    "patch_stem", dim, (1, 3)[k % 2], height, width, ("float16", "bfloat16")[j % 2],
                    ("layernorm", "batchnorm")[k % 5 == 4], layout=("channels_last", "contiguous")[k // 2 % 2],
                )
            )  # fmt: skip
    for i, channels in enumerate((8, 32, 40, 64, 96, 128, 192, 256, 384, 768)):
        for j, (height, width) in enumerate([(2, 2), (3, 7), (14, 14), (56, 56), (29, 30)]):
            k = i + j
            cases.append(
                Patch(
                    "downsample", channels, (1, 3, 2)[k % 3], height, width, ("float16", "bfloat16")[k % 2],
                    ("layernorm", "batchnorm")[k % 4 == 3],
                )
            )  # fmt: skip
    return cases


def network_cases() -> list[Patch]:
    """Those of ConvFirst-T and ConvNeXt-T at batch 128 and 224x224."""
    cases = [Patch("stem", 64, 128, 224, 224), Patch("patch_stem", 96, 128, 224, 224)]
    for channels, side in ((64, 56), (128, 28), (256, 14), (96, 56), (192, 28), (384, 14)):
        cases.append(Patch("downsample", channels, 128, side, side))
    return cases + [replace(case, dtype="bfloat16") for case in cases]


def small_cases() -> list[Patch]:
    """A few that touch every code path at little cost: for the sanitizers."""
    cases = [Patch("stem", dim, 2, 37, 40) for dim in (32, 64, 96, 128)]
    cases += [Patch("stem", 64, 3, 33, 35, "bfloat16", "batchnorm", layout="contiguous")]
    cases += [Patch("patch_stem", 96, 2, 33, 38), Patch("patch_stem", 64, 1, 9, 13, layout="contiguous")]
    return cases + [Patch("downsample", channels, 3, 9, 13) for channels in (32, 64, 96, 128, 256, 384)]
