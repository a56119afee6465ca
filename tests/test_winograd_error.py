"""The measurement of Winograd's error on small layers."""

from pathlib import Path

import pytest

pytest.importorskip("convfirst_kernels")


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    from winograd_error import measure

    return measure


def test_rows_order_the_algorithms(measure):
    rows = measure(layers=(("a", 16, 8, 224), ("b", 3, 4, 6)), repeats=2, side=12)
    assert [(row["precision"], row["layer"]) for row in rows] == [
        (precision, layer) for precision in ("float32", "float16-storage", "float16", "bfloat16") for layer in "ab"
    ]
    assert [row["side"] for row in rows] == [12, 6] * 4
    for row in rows:
        assert row["f4_integers_ratio"] == pytest.approx(row["f4_integers_max"] / row["direct_max"], rel=0.02)
        if row["precision"] == "float16-storage":  # the result's rounding hides what the algorithms differ in
            assert row["f4_integers_ratio"] == pytest.approx(1, abs=0.05)
        elif row["layer"] == "a":  # the other has too few pixels to compare points by
            assert row["f2_relative"] < row["f4_eighths_relative"] < row["f4_integers_relative"]
