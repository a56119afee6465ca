"""Measure the error of Winograd's convolution on VGG-E's layers: python scripts/winograd_error.py [--repeats 3].

Writes results/winograd-error.json: for each 3x3 layer and dtype the largest and the relative (root mean square) error
of direct convolution, F(2x2, 3x3), and F(4x4, 3x3) with two choices of interpolation points, against float64 on the
same rounded inputs, and the largest as a multiple of direct convolution's. Inputs and filters are uniform in [-1, 1];
images are cut to 28 pixels a side, which leaves the length of the sums as it is.

Everything runs on the CPU with sums in float32. "direct" is im2col and a matrix product, by the same routine as
Winograd's products, so that the algorithms alone differ; "conv2d" is PyTorch's convolution, whose sums are split
otherwise. A dtype rounds the inputs, the result and, but for "-storage", both factors of Winograd's products, as tensor
cores take them.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY)]

from convfirst_kernels.winograd import cook_toom  # noqa: E402
from convfirst_kernels.winograd.reference import correlate  # noqa: E402

from convfirst.app.results import write_results  # noqa: E402

# VGG-E (arXiv 1409.1556, table 1), its distinct layers: name, input channels, output channels, pixels a side.
LAYERS = (
    ("1.1", 3, 64, 224), ("1.2", 64, 64, 224), ("2.1", 64, 128, 112), ("2.2", 128, 128, 112), ("3.1", 128, 256, 56),
    ("3.2", 256, 256, 56), ("4.1", 256, 512, 28), ("4.2", 512, 512, 28), ("5", 512, 512, 14),
)  # fmt: skip
WINOGRAD = {
    "f2": cook_toom(2, 3),
    "f4_integers": cook_toom(4, 3, (0, 1, -1, 2, -2)),
    "f4_eighths": cook_toom(4, 3, (0, 0.625, -0.625, 1.5, -1.5)),
}
# Name: dtype of inputs and result, dtype of the factors of Winograd's products.
PRECISIONS = {
    "float32": (torch.float32, torch.float32),
    "float16-storage": (torch.float16, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
}


def layer_errors(channels: int, outputs: int, side: int, repeats: int) -> dict[str, dict[str, float]]:
    """{precision: {algorithm_max, algorithm_relative}}, the largest of ``repeats`` draws."""
    worst = {precision: {} for precision in PRECISIONS}
    for seed in range(repeats):
        generator = torch.Generator().manual_seed(seed)
        x, weight = (torch.rand(*size, generator=generator) * 2 - 1 for size in (
            (1, channels, side, side), (outputs, channels, 3, 3),
        ))  # fmt: skip
        for precision, (storage, operands) in PRECISIONS.items():
            found = _errors(x.to(storage), weight.to(storage), operands)
            worst[precision] = {key: max(value, worst[precision].get(key, 0.0)) for key, value in found.items()}
    return worst


def _errors(x: torch.Tensor, weight: torch.Tensor, operands: torch.dtype) -> dict[str, float]:
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    direct = weight.float().flatten(1) @ F.unfold(x.float(), 3, padding=1)
    results = {"direct": direct.view(exact.shape), "conv2d": F.conv2d(x.float(), weight.float(), padding=1)}
    results |= {name: correlate(x, weight, 1, transform, operands) for name, transform in WINOGRAD.items()}
    found = {}
    for name, result in results.items():
        error = result.to(x.dtype).double() - exact
        found[f"{name}_max"] = error.abs().max().item()
        found[f"{name}_relative"] = (error.norm() / exact.norm()).item()
    return found


def measure(layers: tuple = LAYERS, repeats: int = 3, side: int = 28) -> list[dict]:
    """A row for each precision and layer; ``*_ratio`` is the largest error over direct convolution's."""
    rows = []
    for name, channels, outputs, size in layers:
        size = min(size, side)
        for precision, errors in layer_errors(channels, outputs, size, repeats).items():
            ratios = {f"{each}_ratio": errors[f"{each}_max"] / errors["direct_max"] for each in ("conv2d", *WINOGRAD)}
            numbers = {key: float(f"{value:.3g}") for key, value in (errors | ratios).items()}
            layer = {"layer": name, "channels": channels, "outputs": outputs, "side": size}
            rows.append({**layer, "precision": precision, **numbers})
        print(rows[-len(PRECISIONS)], flush=True)
    return sorted(rows, key=lambda row: list(PRECISIONS).index(row["precision"]))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="draws of inputs and filters a layer")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results/winograd-error.json")
    options = parser.parse_args(arguments)
    print("wrote", write_results(options.output, "winograd-error", measure(repeats=options.repeats)))


if __name__ == "__main__":
    main(sys.argv[1:])
