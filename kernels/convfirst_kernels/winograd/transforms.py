"""Winograd's transform matrices for F(m, r), constructed exactly from interpolation points (Cook-Toom).

F(m, r) computes m outputs of a correlation with r taps, ``y[i] = sum_k d[i + k] g[k]``, from n = m + r - 1 inputs by
n products: ``y = A^T ((G g) * (B^T d))`` (Lavin & Gray, arXiv 1509.09308, section 4). Nested, F(m x m, r x r) is
``Y = A^T ((G g G^T) * (B^T d B)) A``.

Run as a script, this file rewrites the kernels' constants, csrc/winograd/transforms.h.
"""

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

Matrix = tuple[tuple[Fraction, ...], ...]

# Where none are given: small integers and their inverses, whose powers stay small.
DEFAULT_POINTS = tuple(map(Fraction, ("0", "1", "-1", "2", "-2", "1/2", "-1/2", "4", "-4", "1/4", "-1/4")))
# Other points than those, and why. F(4, 3): a smaller error than with 0, +-1, +-2 (results/winograd-error.json).
POINTS = {(4, 3): tuple(map(Fraction, ("0", "5/8", "-5/8", "3/2", "-3/2")))}
# What the kernels use: F(2x2, 3x3), F(4x4, 3x3), and F(3x3, 2x2) for the gradient of the filter.
IN_KERNELS = ((2, 3), (4, 3), (3, 2))
HEADER = Path(__file__).parents[2] / "csrc/winograd/transforms.h"


class Transform(NamedTuple):
    """F(m, r) with n = m + r - 1 products."""

    m: int
    r: int
    points: tuple[Fraction, ...]  # n - 1; the last point is infinity
    output: Matrix  # A^T [m, n]
    filter: Matrix  # G [n, r]
    input: Matrix  # B^T [n, n]


def cook_toom(m: int, r: int, points: Iterable[int | float | str | Fraction] | None = None) -> Transform:
    """F(m, r) at m + r - 2 distinct rational points and infinity.

    The product of polynomials g(t) h(t) of degrees r - 1 and m - 1 is interpolated from its values at the points
    (Toom, Cook); the correlation is the transposed problem (Winograd). What interpolation divides by goes into G, but
    for powers of two: each row of G has a sum of magnitudes in [1, 2), so that transformed filters neither shrink nor
    grow where they are stored in 16 bits. Powers of two change no rounding error.

    Args:
        m: outputs, at least 1.
        r: taps, at least 1.
        points: rational numbers (a float counts as the fraction that it is). Default: those of `POINTS` where F(m, r)
            is in there, else the first of `DEFAULT_POINTS`.

    Raises:
        ValueError: m, r or the points can't be used; the message says which and what is needed.
    """
    for name, value in (("m", m), ("r", r)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}; it must be an integer of at least 1")
    points = _chosen(m, r) if points is None else _fractions(points)
    _check(m, r, points)
    output, filter, input = [], [], []
    for j, point in enumerate(points):
        others = [other for k, other in enumerate(points) if k != j]
        row = _monic(others)  # the polynomial that vanishes at every other point
        scale = _evaluate(row, point)
        taps = [point**k / scale for k in range(r)]
        shift = _power_of_two(sum(map(abs, taps))) * (1 if scale > 0 else -1)
        output.append([point**i for i in range(m)])
        filter.append(tuple(tap * shift for tap in taps))
        input.append(tuple(coefficient / shift for coefficient in (*row, Fraction(0))))
    output.append([Fraction(i == m - 1) for i in range(m)])
    filter.append(tuple(Fraction(k == r - 1) for k in range(r)))
    input.append(tuple(_monic(points)))
    return Transform(m, r, points, tuple(zip(*output, strict=True)), tuple(filter), tuple(input))


def _chosen(m: int, r: int) -> tuple[Fraction, ...]:
    needed = m + r - 2
    if needed > len(DEFAULT_POINTS):
        raise ValueError(f"F({m}, {r}) needs {needed} points; by default there are {len(DEFAULT_POINTS)}, so give them")
    return POINTS.get((m, r), DEFAULT_POINTS[:needed])


def _fractions(points: Iterable) -> tuple[Fraction, ...]:
    fractions = []
    for point in points:
        try:
            fractions.append(Fraction(point))
        except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise ValueError(f"point {point!r} is not a rational number; infinity is always added") from error
    return tuple(fractions)


def _check(m: int, r: int, points: tuple[Fraction, ...]) -> None:
    shown = ", ".join(map(str, points)) or "none"
    if len(points) != m + r - 2:
        needed = f"m + r - 2 = {m + r - 2}"
        raise ValueError(f"F({m}, {r}) needs {needed} points beside infinity; {len(points)} given: {shown}")
    repeated = {str(point) for point in points if points.count(point) > 1}
    if repeated:
        raise ValueError(f"points must differ; repeated: {', '.join(sorted(repeated))} in {shown}")


def _monic(roots: Iterable[Fraction]) -> list[Fraction]:
    """Coefficients, of the constant first, of the product of (t - root)."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [a - root * b for a, b in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


def _evaluate(coefficients: list[Fraction], point: Fraction) -> Fraction:
    return sum(coefficient * point**k for k, coefficient in enumerate(coefficients))


def _power_of_two(value: Fraction) -> Fraction:
    """The power of two that brings a positive value into [1, 2)."""
    power = Fraction(1)
    while value * power < 1:
        power *= 2
    while value * power >= 2:
        power /= 2
    return power


def header() -> str:
    """The text of csrc/winograd/transforms.h: the constants of F(m, r) of `IN_KERNELS`, rounded once to float32."""
    structs = "\n".join(_struct(cook_toom(m, r)) for m, r in IN_KERNELS)
    return f"""\
// Generated: python kernels/convfirst_kernels/winograd/transforms.py. It tells where the matrices come from.
#pragma once

namespace convfirst::winograd {{

// F(M, R): M outputs of a correlation with R taps g from kInputs inputs d, output [(filter g) * (input d)].
template <int M, int R>
struct Transform;

{structs}
}}  // namespace convfirst::winograd
"""


def _struct(transform: Transform) -> str:
    m, r, points, output, filter, input = transform
    functions = "".join(_function(*each) for each in (("output", output), ("filter", filter), ("input", input)))
    return f"""\
// Points {", ".join(map(str, points))} and infinity.
template <>
struct Transform<{m}, {r}> {{
  static constexpr int kInputs = {m + r - 1};
{functions}}};
"""


def _function(name: str, matrix: Matrix) -> str:
    # A function, since device code can't index a static constexpr array of a class; unrolled, it folds into constants.
    symbol = {"output": "A^T", "filter": "G", "input": "B^T"}[name]
    rows = ",\n".join(f"        {{{', '.join(map(_literal, row))}}}" for row in matrix)
    return f"""\
  // {symbol}
  static constexpr float {name}(int row, int column) {{
    constexpr float values[{len(matrix)}][{len(matrix[0])}] = {{
{rows}}};
    return values[row][column];
  }}
"""


def _literal(value: Fraction) -> str:
    text = f"{float(value):.9g}"  # nine digits tell every float32 apart
    return text + ("f" if "." in text or "e" in text else ".0f")


def main() -> None:
    temporary = HEADER.with_name(f".{HEADER.name}.{os.getpid()}")
    temporary.write_text(header())
    os.replace(temporary, HEADER)
    print("wrote", HEADER)


if __name__ == "__main__":
    main()
