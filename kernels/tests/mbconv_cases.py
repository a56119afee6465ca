"""The problems that the MBConv block's tests run; how a result is judged is in cases.py."""

from dataclasses import dataclass, replace

import torch
from cases import guarded, pairwise
from torch import Tensor

from convfirst_kernels import reference
from convfirst_kernels.planner import MBConvProblem

SIZES = [(1, 1), (1, 29), (23, 1), (7, 7), (13, 17), (14, 14), (28, 28), (56, 56)]
MAX_ELEMENTS = 1 << 24  # of x, and of the hidden tensor in float64 eight times as many
MAX_PRODUCTS = 12e9  # multiply-adds of the two matrix products


@dataclass(frozen=True)
class MBConv(MBConvProblem):
    """A problem and which of the optional tensors it has."""

    biases: bool = True
    sample_scale: bool = False

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("biases", "sample_scale") if getattr(self, name))
        return (
            f"c{self.channels}-h{self.hidden}-g{self.group_width}-{self.activation}-{self.dtype}"
            f"-{self.batch}x{self.height}x{self.width}{flags}"
        )


def mbconv_cases() -> list[MBConv]:
    """Every pair of width, group width, expansion, activation, dtype, size, batch and options."""
    factors = {
        "channels": [8, 16, 24, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 232, 256, 320, 384],
        "group_width": [1, 8, 16],
        "expansion": [4, 6],
        "dtype": ["float16", "bfloat16"],
        "activation": ["relu", "silu", "gelu"],
        "size": SIZES,
        "batch": [1, 2, 3, 7, 128],
        "biases": [True, False],
        "sample_scale": [True, False],
    }
    return [_case(row) for row in pairwise(factors, _bounded)]


def _case(row: dict) -> MBConv:
    hidden = -(-row["channels"] * row["expansion"] // 16) * 16
    return MBConv(
        row["batch"], *row["size"], row["channels"], hidden, row["group_width"], row["dtype"], row["activation"],
        row["biases"], row["sample_scale"],
    )  # fmt: skip


def _bounded(row: dict) -> bool:
    pixels = row["batch"] * row["size"][0] * row["size"][1]
    channels = row["channels"]
    return pixels * channels <= MAX_ELEMENTS and 2 * pixels * channels**2 * row["expansion"] <= MAX_PRODUCTS


def network_cases() -> list[MBConv]:
    """Blocks of stride 1 of EfficientNet-B0 and MobileNetV2 at 224x224, and of a network with groups."""
    shapes = [(24, 56, 144), (40, 28, 240), (80, 14, 480), (112, 14, 672), (192, 7, 1152), (320, 7, 1920)]
    cases = [MBConv(32, side, side, channels, hidden) for channels, side, hidden in shapes]
    cases += [MBConv(32, 56, 56, 64, 256, 8), MBConv(32, 28, 28, 128, 512, 8), MBConv(32, 14, 14, 256, 1024, 16)]
    return cases + [replace(case, dtype="bfloat16") for case in cases]


def small_cases() -> list[MBConv]:
    """A few problems that touch every code path at little cost: for the sanitizers."""
    cases = []
    for channels, group_width, activation in ((24, 1, "silu"), (64, 8, "relu"), (80, 16, "gelu"), (160, 1, "silu")):
        for height, width in ((1, 1), (9, 17)):
            cases.append(
                MBConv(2, height, width, channels, 6 * channels // 16 * 16, group_width, "float16", activation)
            )
    cases.append(MBConv(3, 7, 7, 256, 1024, 8, "bfloat16", "silu", biases=False))
    cases.append(MBConv(2, 7, 7, 384, 1536, 1, "float16", "silu", sample_scale=True))
    return cases


def mbconv_inputs(case: MBConv, seed: int, device: str = "cuda", guard: int = 4096) -> tuple:
    """Random arguments of ``torch.ops.convfirst.mbconv_block``, every value exact in the case's dtype.

    x lies between ``guard`` NaNs on either side, so that a read past its ends shows.
    """
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(dtype)

    def bias(length: int) -> Tensor | None:
        return normal(length, scale=0.5).float() if case.biases else None

    c, h, width = case.channels, case.hidden, case.group_width
    x = guarded(case.batch, c, case.height, case.width, dtype, device, guard)
    x.copy_(normal(case.batch, c, case.height, case.width))
    keep = torch.randint(0, 2, (case.batch,), generator=generator, device=device).float() / 0.5
    return (
        x,
        normal(h, c, scale=c**-0.5),
        bias(h),
        normal(9, h, width, scale=2 * (9 * width) ** -0.5),
        bias(h),
        normal(c, h, scale=2 * h**-0.5),
        bias(c),
        keep if case.sample_scale else None,
        width,
        case.activation,
    )


def mbconv_oracle(arguments: tuple, slice_elements: int = 1 << 24) -> Tensor:
    """The float64 result, in slices of the batch that bound the hidden tensor."""
    x, *rest = arguments
    wide = [a.double() if isinstance(a, Tensor) else a for a in rest]
    images = max(1, slice_elements // (x.shape[2] * x.shape[3] * rest[0].shape[0]))
    parts = []
    for start in range(0, x.shape[0], images):
        part = slice(start, start + images)
        sample_scale = None if wide[6] is None else wide[6][part]
        parts.append(reference.mbconv_block(x[part].double(), *wide[:6], sample_scale, *wide[7:]))
    return torch.cat(parts)
