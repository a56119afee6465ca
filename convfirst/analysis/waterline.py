"""Waterline analysis: the roofline of a sequence of kernels.

Lavin, "On the Efficiency of Convolutional Neural Networks" (arXiv 2404.03617), extends the roofline, which bounds one
kernel, to the sequence of kernels that a network is, and asks of each whether memory or arithmetic binds it. The
*waterline* is the device's machine balance (FLOP/s over bytes/s): a kernel of lower operational intensity is under
water, where the memory takes longer than the arithmetic. The names are the paper's; as its full text was not at hand,
the definitions are those that its abstract and its public summaries imply:

    kernel:    t_compute = 2 MACs / peak, t_memory = bytes / bandwidth, t = max(t_compute, t_memory)
    sequence:  T = sum of t, attainable efficiency = sum of t_compute / T
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from convfirst.analysis.devices import Ceilings
from convfirst.analysis.kernels import Kernel


@dataclass(frozen=True)
class KernelTime:
    """The least time of one kernel on a device; times in seconds."""

    kernel: Kernel
    compute_s: float
    memory_s: float

    @property
    def attainable_s(self) -> float:
        return max(self.compute_s, self.memory_s)

    @property
    def under_water(self) -> bool:
        return self.memory_s > self.compute_s

    @property
    def depth(self) -> float:
        """Waterline over intensity: how many times longer the memory takes than the arithmetic; above 1 under water."""
        return self.memory_s / self.compute_s if self.compute_s else math.inf

    @property
    def lost_s(self) -> float:
        """Time that the arithmetic units wait for memory at best."""
        return self.attainable_s - self.compute_s


@dataclass(frozen=True)
class Waterline:
    """A kernel sequence against a device's two ceilings."""

    kernels: Sequence[Kernel]
    ceilings: Ceilings

    @cached_property
    def times(self) -> list[KernelTime]:
        return [
            KernelTime(kernel, 2 * kernel.macs / self.ceilings.flops, kernel.bytes / self.ceilings.bandwidth)
            for kernel in self.kernels
        ]

    @property
    def macs(self) -> int:
        return sum(kernel.macs for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """Memory traffic of the sequence."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def weight_bytes(self) -> int:
        """Of the traffic, parameters and buffers, each as often as a kernel reads it."""
        return sum(kernel.weight_bytes for kernel in self.kernels)

    @property
    def intensity(self) -> float:
        """Operational intensity of the sequence in FLOP per byte, 0 of an empty one."""
        return 2 * self.macs / self.bytes if self.bytes else 0.0

    @property
    def depth(self) -> float:
        """Waterline over the sequence's intensity, infinite without multiply-adds."""
        return self.ceilings.waterline / self.intensity if self.macs else math.inf

    @property
    def latency_s(self) -> float:
        """Predicted time of the sequence: no launch costs, every kernel at its roofline."""
        return sum(time.attainable_s for time in self.times)

    @property
    def compute_s(self) -> float:
        """Time of the arithmetic alone: the ideal latency."""
        return sum(time.compute_s for time in self.times)

    @property
    def lost_s(self) -> float:
        """Time that the arithmetic units wait for memory at best, under-water kernels together."""
        return sum(time.lost_s for time in self.times)

    @property
    def efficiency(self) -> float:
        """Attainable computational efficiency of the sequence."""
        return self.compute_s / self.latency_s

    @property
    def under_water(self) -> list[KernelTime]:
        """The memory-bound kernels, those that lose most time first."""
        return sorted((time for time in self.times if time.under_water), key=lambda time: -time.lost_s)

    @property
    def share_under_water(self) -> float:
        """Share of the predicted time that memory-bound kernels take."""
        return sum(time.attainable_s for time in self.under_water) / self.latency_s
