"""The latency equation, and what an efficiency gap is made of.

arXiv 2404.03617 relates latency to arithmetic through computational efficiency:

    latency = 2 MACs images / (peak x efficiency)

with the peak in FLOP/s. The ideal latency is that at efficiency 1; the *efficiency gap* lies between it and the
measured latency. The equation is applied here per image, at a stated batch.
"""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
MODELS_IMAGE_SIZE = 224  # of the suite `models`, whose rows don't name it
FAMILIES = ("ConvFirst", "ConvNeXt", "EfficientNet", "EfficientNetV2", "RegNet", "ResNet")
_RUN_TWICE = ("ConvFirst", "ConvNeXt")  # families that are measured with fused blocks and without


@dataclass(frozen=True)
class Accuracy:
    """ImageNet-1K top-1 of a model at an image size; `top1` is None where it isn't known."""

    model: str
    family: str
    image_size: int
    top1: float | None
    source: str


@dataclass(frozen=True)
class Measurement:
    """A measured forward pass: time of a batch, how it was run, where it is recorded, and whether blocks were fused."""

    model: str
    image_size: int
    batch: int
    dtype: str
    ms: float
    path: str
    source: str
    fused: bool = False

    @property
    def way(self) -> str:
        """How it was run in a word: "fused", "Inductor", "eager", "torch.compile"."""
        word = "fused" if self.fused else re.split("[+, ]", self.path)[0]
        return "Inductor" if word == "inductor" else word


@dataclass(frozen=True)
class Point:
    """One model, run in one way, of an efficiency-gap plot. Times per image.

    Attributes:
        accuracy: the published one.
        macs: multiply-adds of an image.
        peak_flops: of the device, FLOP/s.
        measurement: None where only the ideal is known.
        own: accuracy of a training run of one's own.
    """

    accuracy: Accuracy
    macs: int
    peak_flops: float
    measurement: Measurement | None
    own: Accuracy | None = None

    @property
    def name(self) -> str:
        """The model, with how it was run where that isn't the same for all: "convnext_tiny, Inductor"."""
        measured = self.measurement
        if measured is None or not (measured.fused or self.accuracy.family in _RUN_TWICE):
            return self.accuracy.model
        return f"{self.accuracy.model}, {measured.way}"

    @property
    def ideal_s(self) -> float:
        return ideal_latency(self.macs, self.peak_flops)

    @property
    def measured_s(self) -> float | None:
        return None if self.measurement is None else self.measurement.ms / 1e3 / self.measurement.batch

    @property
    def efficiency(self) -> float | None:
        return None if self.measured_s is None else self.ideal_s / self.measured_s


def ideal_latency(macs: float, peak_flops: float, images: int = 1) -> float:
    """Seconds of ``images`` images of ``macs`` multiply-adds each at ``peak_flops`` FLOP/s."""
    return 2 * macs * images / peak_flops


def efficiency(macs: float, peak_flops: float, latency_s: float, images: int = 1) -> float:
    """Computational efficiency: the share of the peak that a latency amounts to."""
    return ideal_latency(macs, peak_flops, images) / latency_s


@dataclass(frozen=True)
class Decomposition:
    """Speed-up of one point over another on the same peak: less work times more efficiency."""

    work: float
    efficiency: float

    @property
    def speedup(self) -> float:
        return self.work * self.efficiency


def decompose(point: Point, reference: Point) -> Decomposition:
    """How much faster ``point`` is than ``reference``, and what of that is less arithmetic, what efficiency.

    Raises:
        ValueError: one of them has no measurement, or their peaks differ.
    """
    if point.efficiency is None or reference.efficiency is None:
        missing = point if point.efficiency is None else reference
        raise ValueError(f"{missing.name} has no measured latency")
    if point.peak_flops != reference.peak_flops:
        raise ValueError(f"peaks differ: {point.peak_flops:g} and {reference.peak_flops:g} FLOP/s")
    return Decomposition(reference.macs / point.macs, point.efficiency / reference.efficiency)


def read_accuracies(path: Path = DATA / "accuracy.csv") -> list[Accuracy]:
    """Published accuracies: model, family, image_size, top1 (empty: not known), source.

    Raises:
        ValueError: a row has an unknown family or no source.
    """
    rows = []
    for line, row in enumerate(_rows(path), start=2):
        if row["family"] not in FAMILIES:
            raise ValueError(f"{path}:{line}: family={row['family']!r}; accepted: {', '.join(FAMILIES)}")
        if not row["source"]:
            raise ValueError(f"{path}:{line}: {row['model']} has no source")
        top1 = float(row["top1"]) if row["top1"] else None
        rows.append(Accuracy(row["model"], row["family"], int(row["image_size"]), top1, row["source"]))
    return rows


def read_published_latencies(device: str, path: Path = DATA / "published_latency.csv") -> list[Measurement]:
    """Latencies that others published for a device."""
    return [
        Measurement(
            row["model"],
            int(row["image_size"]),
            int(row["batch"]),
            row["dtype"],
            1e3 * int(row["batch"]) / float(row["images_per_s"]),
            row["path"],
            row["source"],
        )
        for row in _rows(path)
        if row["device"] == device
    ]


def read_results(paths: Iterable[Path]) -> list[Measurement]:
    """Latencies of networks in result files of the suites ``models`` and ``throughput``, ours and their peers'.

    A row without an image size is taken to be at `MODELS_IMAGE_SIZE`, and its source says so.
    """
    found = []
    for file in paths:
        results = json.loads(file.read_text())
        for row in results["rows"]:
            about = (row.get("image_size", MODELS_IMAGE_SIZE), row["batch"], row["dtype"])
            source = f"{file.parent.name}/{file.name} ({results['device']}, {results['date']})"
            if "image_size" not in row:
                source += f", whose rows name no image size and are taken to be at {MODELS_IMAGE_SIZE} px"
            if "ours_ms" in row:
                path = f"fused blocks, {row['path']}"
                found.append(Measurement(row["name"], *about, row["ours_ms"], path, source, fused=True))
                if row.get("peer_ms"):
                    name, _, how = row["peer"].partition(" ")
                    found.append(Measurement(name, *about, row["peer_ms"], how or "peer", source))
            elif "ms" in row:
                fused = row.get("kernels", "off") != "off"
                path = row["path"] + (f", kernels={row['kernels']}" if fused else "")
                found.append(Measurement(row["name"], *about, row["ms"], path, source, fused))
    return list(dict.fromkeys(found))


def fastest(
    measurements: Sequence[Measurement],
    model: str,
    image_size: int,
    dtypes: Sequence[str] = ("float16",),
    *,
    fused: bool | None = None,
    batch: int | None = None,
) -> Measurement | None:
    """The measurement of a model with the least time an image, None if there is none in those dtypes.

    Args:
        fused: only those with our fused blocks, or only those without; None: both.
        batch: only those at this batch, unless the model was measured at others alone.
    """
    matching = [m for m in measurements if (m.model, m.image_size) == (model, image_size) and m.dtype in dtypes]
    if fused is not None:
        matching = [m for m in matching if m.fused == fused]
    return min([m for m in matching if m.batch == batch] or matching, key=lambda m: m.ms / m.batch, default=None)


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
