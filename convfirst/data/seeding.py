"""Randomness as a pure function of integers: (seed, epoch, image) or (seed, epoch, batch, rank)."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch.utils.data import get_worker_info


def seed_of(*key: int) -> int:
    """A 63-bit seed from non-negative integers; different keys give independent streams (numpy's `SeedSequence`)."""
    # SeedSequence takes (1, 2) and (1, 2, 0) for the same: the length tells them apart
    low, high = np.random.SeedSequence((len(key), *key)).generate_state(2, np.uint32)
    return (int(high) << 32 | int(low)) & (2**63 - 1)


@contextmanager
def seeded(*key: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed python's, numpy's and torch's global generators from `key` inside the block; restore them after it.

    torchvision and timm draw from all three. The generators are set directly rather than by `torch.manual_seed`, which
    would also queue a call on every CUDA device. With a CUDA `device` its generator is included. A DataLoader's worker
    process restores nothing: nobody else draws there, and saving numpy's state takes longer than all the seeding.
    """
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    with nullcontext() if get_worker_info() is not None else _restored(generators):
        seed = seed_of(*key)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 - timm draws from this generator
        for generator in generators:
            generator.manual_seed(seed)
        yield


@contextmanager
def _restored(generators: list[torch.Generator]) -> Iterator[None]:
    before = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
