"""The problems that the block's tests run, and how a result is judged."""

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from convfirst_kernels import reference
from convfirst_kernels.planner import Problem

SIZES = [(1, 1), (1, 29), (23, 1), (7, 7), (14, 14), (13, 17), (28, 28), (56, 56), (225, 193)]
BATCHES = [1, 2, 3, 7, 128]
MAX_ELEMENTS = 128 * 56 * 56 * 64  # of x: bounds a case's work and memory
MAX_PRODUCTS = 24e9  # multiply-adds of the two matrix products
SLICE_ELEMENTS = 1 << 24  # of x that the oracle computes at once
TILE = 8  # side, in pixels, of the tiles that errors are compared over


@dataclass(frozen=True)
class Case:
    """A problem and which of the optional tensors it has."""

    problem: Problem
    biases: bool = True
    affine: bool = True
    layer_scale: bool = True
    sample_scale: bool = False

    def __str__(self) -> str:
        p = self.problem
        flags = [n for n in ("biases", "affine", "layer_scale", "sample_scale") if getattr(self, n)]
        norm = "norm" if p.has_norm else "plain"
        return (
            f"c{p.channels}-h{p.hidden}-k{p.kernel_size}-g{p.group_width}-{p.activation}-{norm}-{p.dtype}"
            f"-{p.batch}x{p.height}x{p.width}-{'+'.join(flags) or 'bare'}"
        )


def pairwise(factors: dict[str, list], allowed: Callable[[dict], bool], seed: int = 0) -> list[dict]:
    """A short list of rows in which every pair of values of two factors occurs that any allowed row has."""
    names, rng = list(factors), random.Random(seed)
    rows: list[dict] = []
    open_pairs = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}
    # Sorted: the order of a set of strings differs from process to process.
    for pair in sorted(open_pairs, key=repr):
        if pair not in open_pairs:
            continue
        best, best_gain = None, 0
        for _ in range(60):
            row = {name: rng.choice(values) for name, values in factors.items()} | dict(pair)
            if not allowed(row):
                continue
            gain = len(_pairs(row, names) & open_pairs)
            if gain > best_gain:
                best, best_gain = row, gain
        open_pairs.discard(pair)
        if best is not None:
            rows.append(best)
            open_pairs -= _pairs(best, names)
    return rows


def _pairs(row: dict, names: list[str]) -> set:
    return {((a, row[a]), (b, row[b])) for a, b in itertools.combinations(names, 2)}


def _bounded(row: dict) -> bool:
    pixels = row["batch"] * row["size"][0] * row["size"][1]
    channels = row["channels"]
    return pixels * channels <= MAX_ELEMENTS and 2 * pixels * channels**2 * row["expansion"] <= MAX_PRODUCTS


def _case(row: dict) -> Case:
    problem = Problem(
        row["batch"], *row["size"], row["channels"], row["channels"] * row["expansion"], row["kernel_size"],
        row["group_width"], row["dtype"], row["activation"], row["norm"],
    )  # fmt: skip
    return Case(problem, row["biases"], row["affine"] and row["norm"], row["layer_scale"], row["sample_scale"])


_COMMON = {
    "dtype": ["float16", "bfloat16"],
    "size": SIZES,
    "batch": BATCHES,
    "biases": [True, False],
    "affine": [True, False],
    "layer_scale": [True, False],
    "sample_scale": [True, False],
}


def conv_first_cases() -> list[Case]:
    """ConvFirst: every pair of width, filter, group width, expansion, activation, norm, dtype, size, batch, options."""
    factors = {
        "channels": [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024],
        "kernel_size": [3, 5],
        "group_width": [8, 16],
        "expansion": [4, 6],
        "activation": ["relu", "silu", "gelu"],
        "norm": [True, False],
        **_COMMON,
    }
    return [_case(row) for row in pairwise(factors, _bounded)]


def convnext_cases() -> list[Case]:
    """ConvNeXt: timm's widths from atto to large."""
    factors = {
        "channels": [40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1536],
        "kernel_size": [7],
        "group_width": [1],
        "expansion": [4],
        "activation": ["gelu"],
        "norm": [True],
        **_COMMON,
        "affine": [True],
    }
    return [_case(row) for row in pairwise(factors, _bounded)]


def network_cases() -> list[Case]:
    """The blocks of ConvFirst-T and ConvNeXt-T at batch 128 and 224x224, as they are in the networks."""
    cases = []
    for dtype in ("float16", "bfloat16"):
        for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
            for norm in (True, False):
                problem = Problem(128, side, side, channels, 4 * channels, 3, 8, dtype, "silu", norm)
                cases.append(Case(problem, affine=norm))
        for channels, side in ((96, 56), (192, 28), (384, 14), (768, 7)):
            cases.append(Case(Problem(128, side, side, channels, 4 * channels, 7, 1, dtype, "gelu", True)))
    return cases


def small_cases() -> list[Case]:
    """A few problems that touch every code path at little cost: for the sanitizers."""
    cases = []
    for channels, side, width, activation in (
        (64, 3, 8, "silu"),
        (128, 5, 16, "relu"),
        (96, 7, 1, "gelu"),
        (40, 7, 1, "gelu"),
    ):
        for height, columns in ((1, 1), (9, 17)):
            problem = Problem(2, height, columns, channels, 4 * channels, side, width, "float16", activation, True)
            cases.append(Case(problem, sample_scale=True))
    cases.append(Case(Problem(1, 7, 7, 256, 1024, 3, 8, "bfloat16", "silu", False), affine=False))
    cases.append(Case(Problem(3, 7, 7, 512, 2048, 3, 8, "float16", "silu", True)))
    return cases


def backward_small_cases() -> list[Case]:
    """Blocks in both dtypes, of widths on either side of 256 channels, for the sanitizers to differentiate."""
    cases = []
    for dtype in ("float16", "bfloat16"):
        for height, width, channels, side, group_width, activation, norm in (
            (9, 17, 64, 3, 8, "silu", True),
            (5, 6, 128, 5, 16, "relu", False),
            (7, 7, 256, 3, 8, "silu", True),
            (7, 7, 512, 3, 8, "silu", True),
            (9, 17, 96, 7, 1, "gelu", True),
            (7, 7, 384, 7, 1, "gelu", True),
        ):
            problem = Problem(2, height, width, channels, 4 * channels, side, group_width, dtype, activation, norm)
            cases.append(Case(problem, affine=norm, sample_scale=True))
    return cases


def inputs(case: Case, seed: int, device: str = "cuda", guard: int = 4096) -> tuple:
    """Random arguments of ``torch.ops.convfirst.conv_first_block``, every value exact in the problem's dtype.

    x lies between ``guard`` NaNs on either side, so that a read past its ends shows.
    """
    p = case.problem
    dtype = getattr(torch, p.dtype)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(scale).add_(mean).to(dtype)

    def vector(wanted: bool, length: int, scale: float, mean: float = 0.0) -> Tensor | None:
        return normal(length, scale=scale, mean=mean).float() if wanted else None

    c, h, taps = p.channels, p.hidden, p.kernel_size**2
    x = guarded(p.batch, c, p.height, p.width, dtype, device, guard)
    x.copy_(normal(p.batch, c, p.height, p.width))
    keep = torch.randint(0, 2, (p.batch,), generator=generator, device=device).float() / 0.5
    return (
        x,
        normal(taps, c, p.group_width, scale=(taps * p.group_width) ** -0.5),
        vector(case.biases, c, 0.2),
        vector(case.affine and p.has_norm, c, 0.2, 1.0),
        vector(case.affine and p.has_norm, c, 0.2),
        normal(h, c, scale=c**-0.5),
        vector(case.biases, h, 0.2),
        normal(c, h, scale=h**-0.5),
        vector(case.biases, c, 0.2),
        vector(case.layer_scale, c, 0.3, 1.0),
        keep if case.sample_scale else None,
        p.group_width,
        p.activation,
        1e-6,
        p.has_norm,
    )


def guarded(n: int, c: int, h: int, w: int, dtype: torch.dtype, device: str, guard: int = 4096) -> Tensor:
    """A channels_last tensor of NaNs [n, c, h, w] inside a larger buffer of NaNs."""
    buffer = torch.full((n * h * w * c + 2 * guard,), float("nan"), dtype=dtype, device=device)
    return buffer[guard : guard + n * h * w * c].view(n, h, w, c).permute(0, 3, 1, 2)


def guards_intact(tensor: Tensor, guard: int = 4096) -> bool:
    """Whether nothing was written around a tensor that `guarded` made."""
    buffer = tensor._base
    return bool(buffer[:guard].isnan().all() and buffer[-guard:].isnan().all())


def oracle(arguments: tuple) -> Tensor:
    """The float64 result, in slices of the batch that bound its memory."""
    x, *rest = arguments
    wide = [a.double() if isinstance(a, Tensor) else a for a in rest]
    images = max(1, SLICE_ELEMENTS // x[0].numel())
    parts = []
    for start in range(0, x.shape[0], images):
        part = slice(start, start + images)
        sample_scale = None if wide[9] is None else wide[9][part]
        parts.append(reference.conv_first_block(x[part].double(), *wide[:9], sample_scale, *wide[10:]))
    return torch.cat(parts)


def tile_max(error: Tensor) -> Tensor:
    """[N, C, H, W] -> largest value in each tile of TILE x TILE pixels and all channels."""
    return torch.nn.functional.max_pool2d(error.amax(1), TILE, ceil_mode=True)


def spacing(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring numbers of ``dtype`` at each value: the rounding quantum."""
    exponent = torch.floor(torch.log2(value.abs().clamp_min(torch.finfo(dtype).tiny)))
    return torch.finfo(dtype).eps * torch.exp2(exponent)


def matrix_tile_max(error: Tensor, tile: tuple[int, int]) -> Tensor:
    """[rows, columns] -> largest value in each tile.

    The last tile of a side ends at its end and overlaps the one before: a remainder of three rows would hang on chance,
    as the largest of few errors differs twofold between sums of the same numbers in two orders.
    """
    for side, length in enumerate(tile):
        size = error.shape[side]
        if size > length and size % length:
            last = error.narrow(side, size - length, length)
            error = torch.cat([error.narrow(side, 0, size - size % length), last], side)
    return torch.nn.functional.max_pool2d(error[None, None], tile, ceil_mode=True)


def worst_ratio(result: Tensor, truth: Tensor, peer: Tensor) -> float:
    """`worst_ratio_of` one draw in tiles of TILE x TILE pixels."""
    return worst_ratio_of([(result, truth, peer)], tile_max)


def worst_ratio_of(draws: Iterable[tuple[Tensor, Tensor, Tensor]], largest: Callable[[Tensor], Tensor]) -> float:
    """Largest error of a tile over its bound: 2x the peer's error there plus 2x the rounding quantum. Good: <= 1.

    ``draws`` are results, truths and peers of the same problem on other numbers; errors and quanta are the largest of
    all draws, so that a tile of few values has a bound that rests on many. ``largest`` makes tiles' maxima of errors.
    NaN in a result gives infinity.
    """
    most = None
    for result, truth, peer in draws:
        error = (result.double() - truth).abs().nan_to_num(nan=float("inf"))
        values = torch.stack([
            largest(error), largest((peer.double() - truth).abs()), largest(spacing(truth, result.dtype))
        ])  # fmt: skip
        most = values if most is None else torch.maximum(most, values)
    ours, theirs, quantum = most
    return float((ours / (2 * theirs + 2 * quantum)).max())


def draws_of(values: int, wanted: int = 1024) -> int:
    """How many draws of a problem give ``wanted`` errors to compare, where one gives ``values``."""
    return -(-wanted // values)
