"""Arithmetic, operational intensity, waterline and efficiency gap of any timm or ConvFirst model; no GPU needed."""

from convfirst.analysis.devices import Ceilings, Device, device_names, load_device
from convfirst.analysis.kernels import PARTITIONS, Kernel, blocks, kernels, layers
from convfirst.analysis.latency import decompose, efficiency, ideal_latency
from convfirst.analysis.trace import Trace, trace
from convfirst.analysis.waterline import KernelTime, Waterline

__all__ = [
    "PARTITIONS",
    "Ceilings",
    "Device",
    "Kernel",
    "KernelTime",
    "Trace",
    "Waterline",
    "blocks",
    "decompose",
    "device_names",
    "efficiency",
    "ideal_latency",
    "kernels",
    "layers",
    "load_device",
    "trace",
]
