"""Which image goes into which batch of which process: pure functions of (seed, epoch)."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from convfirst.data.seeding import seed_of

# timm's RepeatAugSampler keeps a multiple of this many images an epoch (DeiT's original does the same)
REPEAT_ROUND = 256


class Batches(NamedTuple):
    """`indices` and `copies`, both int64 [batches, batch_size]; `copies` numbers the repetitions of one image."""

    indices: np.ndarray
    copies: np.ndarray


@dataclass(frozen=True)
class TrainOrder:
    """The training order of one process: a permutation from (seed, epoch), dealt out to the ranks in turn.

    Every rank has the same number of batches; what doesn't fill one on every rank is left out. Taken over all ranks,
    step k holds images [k * B, (k + 1) * B) of the permutation, B being the global batch, so the number of processes
    doesn't change which images meet in a step. With `repeats` > 1 each image follows itself that many times before the
    dealing, and an epoch keeps its length (`timm.data.distributed_sampler.RepeatAugSampler`).
    """

    num_images: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise ValueError(
                f"{self.num_images} training images give no batch: {self.world_size} process(es) x "
                f"batch_size={self.batch_size} need {self.world_size * self.batch_size}; lower data.batch_size"
            )

    def __len__(self) -> int:
        """Batches an epoch."""
        num_images = self.num_images
        if self.repeats > 1 and num_images >= REPEAT_ROUND:
            num_images -= num_images % REPEAT_ROUND
        return num_images // (self.batch_size * self.world_size)

    def batches(self, epoch: int, start: int = 0) -> Batches:
        """The batches `start`, `start + 1`, ... of `epoch` on this rank."""
        generator = np.random.Generator(np.random.PCG64(seed_of(self.seed, epoch)))
        order = np.repeat(generator.permutation(self.num_images), self.repeats)
        copies = np.tile(np.arange(self.repeats), self.num_images)
        mine = slice(self.rank, len(self) * self.batch_size * self.world_size, self.world_size)
        shape = len(self), self.batch_size
        return Batches(order[mine].reshape(shape)[start:], copies[mine].reshape(shape)[start:])


def eval_batches(num_images: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
    """One rank's evaluation batches, int64 [<= batch_size] each: every image on exactly one rank, none twice.

    All ranks have the same number of batches (collective calls in a forward pass stay matched) although their shards
    may differ by one image: where a shard would end a batch early, its last batch is split in two.

    Raises:
        ValueError: if there are too few images for every rank to have one in each step.
    """
    shard = np.arange(rank, num_images, world_size)
    steps = -(-num_images // (world_size * batch_size))
    if len(shard) < steps:
        raise ValueError(
            f"{num_images} evaluation images can't be shared by {world_size} processes with "
            f"data.eval_batch_size={batch_size}: take fewer processes or a larger batch"
        )
    batches = [shard[i : i + batch_size] for i in range(0, len(shard), batch_size)]
    if len(batches) < steps:
        batches[-1:] = [batches[-1][:-1], batches[-1][-1:]]
    return batches
