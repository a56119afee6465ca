"""What the planner decides and why: a window on csrc/block_fusion/plan.cpp, no GPU needed."""

import json
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from convfirst_kernels import library


@dataclass(frozen=True)
class Device:
    """A GPU as the planner sees it."""

    capability: int  # 10 * major + minor
    multiprocessors: int
    max_shared_memory: int  # bytes that a block may opt in to

    @classmethod
    def named(cls, name: str) -> "Device":
        """A known GPU: "a100", "rtx3090", "rtx4090", "l40s", "h100", "h200"; or "cuda", "cuda:1" for one that is here.

        Raises:
            ValueError: the name is neither.
        """
        if name.startswith("cuda"):
            return cls.of(torch.device(name).index or 0)
        if name not in _DEVICES:
            raise ValueError(f"device={name!r} is unknown; accepted: 'cuda', 'cuda:<index>', {', '.join(_DEVICES)}")
        return _DEVICES[name]

    @classmethod
    def of(cls, index: int) -> "Device":
        """The CUDA device of this index."""
        properties = torch.cuda.get_device_properties(index)
        capability = 10 * properties.major + properties.minor
        return cls(capability, properties.multi_processor_count, properties.shared_memory_per_block_optin)


_DEVICES = {
    "a100": Device(80, 108, 166912),
    "rtx3090": Device(86, 82, 101376),
    "rtx4090": Device(89, 128, 101376),
    "l40s": Device(89, 142, 101376),
    "h100": Device(90, 132, 232448),
    "h200": Device(90, 132, 232448),
}


def plan(
    *,
    batch: int,
    height: int,
    width: int,
    channels: int,
    hidden: int,
    kernel_size: int,
    group_width: int,
    dtype: str,
    activation: str,
    has_norm: bool,
    device: Device,
    path: str = "",
) -> dict:
    """The planner's answer: {"problem", "device", "path", "chosen", "candidates"}; see csrc/block_fusion/plan.h."""
    return json.loads(
        torch.ops.convfirst.plan_conv_first_block(
            batch, height, width, channels, hidden, kernel_size, group_width, dtype, activation, has_norm,
            device.capability, device.multiprocessors, device.max_shared_memory, path,
        )  # fmt: skip
    )


@contextmanager
def force_path(path: str):
    """Within the context every launch uses this path ("sm80", "sm90") or variant; what it lacks is an error.

    ``$CONVFIRST_KERNELS_PATH`` sets it for a whole process.
    """
    former = torch.ops.convfirst.force_path(path)
    try:
        yield
    finally:
        torch.ops.convfirst.force_path(former)


def explain(**problem) -> str:
    return json.dumps(plan(**problem), indent=1)


_ = library
