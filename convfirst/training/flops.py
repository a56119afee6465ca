"""Arithmetic of a model and what a device could do at most."""

import copy

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

# Dense peak in FLOP/s by a part of torch.cuda.get_device_name(), from NVIDIA's data sheets: (16-bit floats, TF32).
# The first match counts.
_PEAKS = {
    "B200": (2250e12, 1100e12),
    "H200": (989e12, 494e12),
    "H100 PCIe": (756e12, 378e12),
    "H100 NVL": (835e12, 417e12),
    "H100": (989e12, 494e12),
    "A100": (312e12, 156e12),
    "A30": (165e12, 82e12),
    "L40S": (362e12, 183e12),
    "L4": (121e12, 60e12),
    "V100": (125e12, 15.7e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak of `device` in FLOP/s for Lightning's `precision` string, None where it isn't known (any CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, (half, single) in _PEAKS.items():
        if part in name:
            return half if precision.startswith(("16", "bf16")) else single
    return None


def forward_flops(model: nn.Module, in_chans: int, size: int) -> int:
    """Floating-point operations (a multiply-add is two) of one forward pass of one [in_chans, size, size] image.

    Counted on the meta device, in float32 whatever the model's dtype: nothing is computed.
    """
    shadow = copy.deepcopy(model).to("meta", torch.float32).eval()
    for module in shadow.modules():
        module.__dict__.pop("forward", None)  # a fused forward would hide its operations from the counter
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.empty(1, in_chans, size, size, device="meta"))
    return counter.get_total_flops()
