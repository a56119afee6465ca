"""Winograd's transform matrices: the identity, exactly, and the constants that the kernels include."""

import re
import shutil
import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import pytest

from convfirst_kernels.winograd import transforms
from convfirst_kernels.winograd.transforms import cook_toom

SOURCES = Path(__file__).parents[1] / "csrc"  # not beside an installed package
SIZES = [(m, r) for m in range(1, 9) for r in range(1, 9) if m + r <= 9]
INTEGERS = (0, 1, -1, 2, -2)


def multiply(a, b):
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a]


def assert_identity(transform):
    """Both sides are bilinear in inputs and taps, so they are the same if they agree on all unit vectors."""
    m, r, _, output, filter, input = transform
    n = m + r - 1
    for i in range(m):
        for tap in range(r):
            for k in range(n):
                value = sum(output[i][j] * filter[j][tap] * input[j][k] for j in range(n))
                assert value == (k == i + tap), (i, tap, k)


@pytest.mark.parametrize(("m", "r"), SIZES)
def test_identity(m, r):
    assert_identity(cook_toom(m, r))
    assert_identity(cook_toom(m, r, [Fraction(3 * k - 7, k + 2) for k in range(m + r - 2)]))


@pytest.mark.parametrize("points", [INTEGERS, (0, 0.625, -0.625, 1.5, -1.5), ("1/3", "-1/3", 5, -5, "7/2")])
def test_identity_of_other_points(points):
    transform = cook_toom(4, 3, points)
    assert transform.points == tuple(map(Fraction, points))
    assert_identity(transform)


@pytest.mark.parametrize(("m", "r"), [(2, 3), (4, 3), (3, 2)])
def test_nested(m, r):
    """Y = A^T ((G g G^T) * (B^T d B)) A is the two-dimensional correlation."""
    transform = cook_toom(m, r)
    n = m + r - 1
    g = [[Fraction(7 * i - 3 * j + 1, 5) for j in range(r)] for i in range(r)]
    d = [[Fraction((i * i + 11 * j) % 13 - 6, 3) for j in range(n)] for i in range(n)]

    def sandwich(matrix, inner):
        return multiply(multiply(matrix, inner), list(zip(*matrix, strict=True)))

    u, v = sandwich(transform.filter, g), sandwich(transform.input, d)
    y = sandwich(transform.output, [[a * b for a, b in zip(p, q, strict=True)] for p, q in zip(u, v, strict=True)])
    for i in range(m):
        for j in range(m):
            assert y[i][j] == sum(d[i + a][j + b] * g[a][b] for a in range(r) for b in range(r))


def test_matrices_of_the_paper():
    """F(2, 3) of arXiv 1509.09308 up to the sign of the last product."""
    half = Fraction(1, 2)
    transform = cook_toom(2, 3)
    assert transform.filter == ((1, 0, 0), (half, half, half), (half, -half, half), (0, 0, 1))
    assert transform.input == ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, -1, 0, 1))
    assert transform.output == ((1, 1, 1, 0), (0, 1, -1, 1))


@pytest.mark.parametrize(("m", "r"), SIZES)
def test_filters_keep_their_size(m, r):
    assert all(1 <= sum(map(abs, row)) < 2 for row in cook_toom(m, r).filter)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "m=0; it must be an integer of at least 1"),
        ((2, 1.5), "r=1.5; it must be an integer of at least 1"),
        ((2, 3, (0, 1)), "F(2, 3) needs m + r - 2 = 3 points beside infinity; 2 given: 0, 1"),
        ((1, 2, ()), "F(1, 2) needs m + r - 2 = 1 points beside infinity; 0 given: none"),
        ((2, 3, (0, 1, 2, 3)), "F(2, 3) needs m + r - 2 = 3 points beside infinity; 4 given: 0, 1, 2, 3"),
        ((2, 3, (0, 0.5, "1/2")), "points must differ; repeated: 1/2 in 0, 1/2, 1/2"),
        ((2, 3, (0, 1, float("inf"))), "point inf is not a rational number; infinity is always added"),
        ((2, 3, (0, 1, "one")), "point 'one' is not a rational number; infinity is always added"),
        ((11, 3), "F(11, 3) needs 12 points; by default there are 11, so give them"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cook_toom(*arguments)


def test_the_kernels_constants_are_up_to_date():
    assert (SOURCES / "winograd/transforms.h").read_text() == transforms.header()


def test_constants_are_the_nearest_floats():
    def bits(value: float) -> int:
        return struct.unpack("<I", struct.pack("<f", value))[0]

    for m, r in transforms.IN_KERNELS:
        transform = cook_toom(m, r)
        for value in sum((*transform.output, *transform.filter, *transform.input), ()):
            near = struct.unpack("<f", struct.pack("<I", bits(float(transforms._literal(value)[:-1]))))[0]
            for other in (bits(near) + 1, max(bits(near), 1) - 1):
                neighbour = struct.unpack("<f", struct.pack("<I", other))[0]
                assert abs(value - Fraction(near)) <= abs(value - Fraction(neighbour))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_the_header_is_constant_in_cpp(tmp_path):
    """Usable where a kernel needs it: in constant expressions; here it correlates 1, 2, 3, 4 with 1, 1, 1."""
    (tmp_path / "use.cpp").write_text("""
#include "winograd/transforms.h"
constexpr float correlate(int i) {
  using T = convfirst::winograd::Transform<2, 3>;
  float y = 0;
  for (int j = 0; j < T::kInputs; ++j) {
    float u = 0, v = 0;
    for (int k = 0; k < 3; ++k) u += T::filter(j, k);
    for (int k = 0; k < T::kInputs; ++k) v += T::input(j, k) * (k + 1);
    y += T::output(i, j) * u * v;
  }
  return y;
}
static_assert(correlate(0) == 6 && correlate(1) == 9);
static_assert(convfirst::winograd::Transform<4, 3>::kInputs == 6);
static_assert(convfirst::winograd::Transform<3, 2>::output(2, 3) == 1);
""")
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    subprocess.run([*command, f"-I{SOURCES}", str(tmp_path / "use.cpp")], check=True)
