"""Random numbers of the training step as a function of where the step stands in the run."""

import numpy as np
import torch


def step_seed(seed: int, rank: int, epoch: int, batch: int) -> None:
    """Seed torch's generators (CPU and every CUDA device) from the four non-negative integers."""
    low, high = np.random.SeedSequence((seed, rank, epoch, batch)).generate_state(2, np.uint32)
    torch.manual_seed((int(high) << 32 | int(low)) & (2**63 - 1))
