"""Inputs of the feed-forward half's backward, and the error of its results in units of their bound."""

from dataclasses import dataclass

import torch
from cases import draws_of, matrix_tile_max, pairwise, worst_ratio_of
from torch import Tensor

GRADIENTS = ("da", "d_expand_weight", "d_expand_bias", "d_project_weight", "d_project_bias", "d_layer_scale")


@dataclass(frozen=True)
class FeedForwardCase:
    batch: int
    height: int
    width: int
    channels: int
    hidden: int
    dtype: str = "bfloat16"
    activation: str = "silu"
    norm: bool = True
    biases: bool = True
    layer_scale: float = 1.0  # its size; 0: absent
    sample_scale: bool = False

    def __str__(self) -> str:
        flags = [n for n in ("norm", "biases", "sample_scale") if getattr(self, n)]
        return (
            f"c{self.channels}-h{self.hidden}-{self.activation}-{self.dtype}-{self.batch}x{self.height}x{self.width}"
            f"-ls{self.layer_scale:g}-{'+'.join(flags) or 'bare'}"
        )

    @property
    def draws(self) -> int:
        """How often the inputs are drawn: of one pixel, a layer scale's gradient is one product a channel."""
        return draws_of(64 * self.batch * self.height * self.width)


def cases() -> list[FeedForwardCase]:
    """Every pair of choices, at awkward sizes."""
    factors = {
        "size": [(1, 1, 1), (3, 7, 7), (5, 13, 11), (2, 56, 56)],
        "channels": [32, 40, 64, 96, 128, 160, 192, 256],
        "expansion": [4, 6],
        "dtype": ["float16", "bfloat16"],
        "activation": ["relu", "silu", "gelu"],
        "norm": [True, False],
        "biases": [True, False],
        "layer_scale": [0.0, 1e-6, 1.0],
        "sample_scale": [False, True],
    }
    return [
        FeedForwardCase(
            *row["size"],
            row["channels"],
            -(-row["channels"] * row["expansion"] // 64) * 64,
            *(row[name] for name in ("dtype", "activation", "norm", "biases", "layer_scale", "sample_scale")),
        )
        for row in pairwise(factors, lambda row: True)
    ]


def inputs(case: FeedForwardCase, seed: int, device: str = "cuda") -> tuple:
    """The operator's arguments."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    n, c, h, w, hidden = case.batch, case.channels, case.height, case.width, case.hidden

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def image(x: Tensor) -> Tensor:
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    a = torch.nn.functional.layer_norm(normal(n, h, w, c), (c,)).permute(0, 3, 1, 2)
    dropped = torch.rand(n, generator=generator, device=device) < 0.4
    return (
        image(a),
        image(normal(n, c, h, w)),
        normal(n * h * w).abs() + 0.5 if case.norm else None,
        (normal(hidden, c) * c**-0.5).to(dtype),
        0.3 * normal(hidden) if case.biases else None,
        (normal(c, hidden) * hidden**-0.5).to(dtype),
        0.3 * normal(c) if case.biases else None,
        case.layer_scale * normal(c) if case.layer_scale else None,
        torch.where(dropped, 0.0, 1 / 0.6) if case.sample_scale else None,
        case.activation,
    )


def widened(arguments: tuple) -> tuple:
    return tuple(a.double() if isinstance(a, Tensor) else a for a in arguments)


def worst_ratio(draws: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """`worst_ratio_of` draws in tiles of 64 x 64; of 64 values of a vector."""
    return worst_ratio_of(draws, lambda error: matrix_tile_max(error.reshape(error.shape[0], -1), (64, 64)))
