"""Random numbers of the training step as a function of where the step stands in the run."""

import numpy as np
import torch


def step_seed(seed: int, rank: int, epoch: int, batch: int) -> None:
    """Seed torch's generators (of the CPU and of every CUDA or MPS device in use) from the four non-negative integers.

    Not by `torch.manual_seed`, which formats the call stack for each kind of device that isn't in use, in every step.
    """
    low, high = np.random.SeedSequence((seed, rank, epoch, batch)).generate_state(2, np.uint32)
    value = (int(high) << 32 | int(low)) & (2**63 - 1)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(value)
