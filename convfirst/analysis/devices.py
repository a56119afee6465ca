"""Devices by their two ceilings: arithmetic and memory bandwidth, from data sheets and from measurements.

`devices/*.json` ships what is known, with the measurements of `results/` copied in. `scripts/measure_device.py`
measures the GPU at hand and writes `results/device-<name>.json`, which wins over what is shipped.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

SHIPPED = Path(__file__).parent / "devices"
DTYPES = ("float16", "bfloat16", "tfloat32", "float32")
KINDS = ("measured", "datasheet")


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at most.

    Attributes:
        flops: FLOP/s of dense matrix products in one dtype, accumulated in float32.
        bandwidth: bytes/s of memory, read and written together.
        kind: "measured" or "datasheet".
        source: where the two numbers come from, and whether a data sheet stands in for a measurement.
    """

    flops: float
    bandwidth: float
    kind: str
    source: str

    @property
    def waterline(self) -> float:
        """Operational intensity, in FLOP per byte, below which memory binds: the machine balance."""
        return self.flops / self.bandwidth


@dataclass(frozen=True)
class Device:
    """A GPU: its name, the short name of its file, and for each kind of ceiling {bandwidth_tbps, tflops, source}."""

    slug: str
    name: str
    sheets: dict

    def ceilings(self, dtype: str = "float16", kind: str | None = None) -> Ceilings:
        """Ceilings for a dtype (or "tfloat32"); by default those measured, where both are, else the data sheet's.

        The source says where the data sheet's take the place of ones that were not measured.

        Raises:
            ValueError: the dtype or the kind is unknown, or this device has no such number.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; accepted: {', '.join(DTYPES)}")
        if kind is not None and kind not in KINDS:
            raise ValueError(f"ceilings={kind!r} is unknown; accepted: {', '.join(KINDS)}")
        for each in KINDS if kind is None else (kind,):
            sheet = self.sheets.get(each, {})
            if "bandwidth_tbps" in sheet and dtype in sheet.get("tflops", {}):
                stands_in = kind is None and each != "measured"
                source = sheet["source"] + (f"; no measured {dtype} for device={self.slug}" if stands_in else "")
                return Ceilings(sheet["tflops"][dtype] * 1e12, sheet["bandwidth_tbps"] * 1e12, each, source)
        raise ValueError(f"{self.name} has no {kind or 'measured or datasheet'} ceilings for {dtype}")


def load_device(slug: str, results: Path | None = None) -> Device:
    """The device of ``devices/<slug>.json``; measurements of ``results``/device-<slug>.json win over the shipped ones.

    Where those are of another GPU with the same short name, as H100s for PCIe have, nothing shipped is taken for it.

    Raises:
        ValueError: there is neither file.
    """
    shipped, measured = SHIPPED / f"{slug}.json", None if results is None else results / f"device-{slug}.json"
    content = json.loads(shipped.read_text()) if shipped.exists() else None
    own = json.loads(measured.read_text()) if measured is not None and measured.exists() else None
    if content is None and own is None:
        raise ValueError(f"device={slug!r} is unknown; accepted: {', '.join(device_names(results))}")
    if own is not None:
        if content is None or content["driver_name"] != own["device"]:
            content = {"slug": slug, "name": own["device"], "sheets": {}}
        content["sheets"]["measured"] = own["measured"]
    return Device(content["slug"], content["name"], content["sheets"])


def device_names(results: Path | None = None) -> list[str]:
    """Short names of the shipped devices, and of those measured in the folder ``results``."""
    measured = [] if results is None else [path.stem.removeprefix("device-") for path in results.glob("device-*.json")]
    return sorted({*(path.stem for path in SHIPPED.glob("*.json")), *measured})


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float16 -> "float16"."""
    return str(dtype).removeprefix("torch.")
