import numpy as np
import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from convfirst.data.order import TrainOrder, eval_batches


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_images, batch_size", [(100, 4), (97, 8), (25, 8)])
def test_training_shards_are_disjoint_and_equally_long(num_images, batch_size, world_size):
    shards = [TrainOrder(num_images, batch_size, 0, rank, world_size).batches(2).indices for rank in range(world_size)]
    assert {shard.shape for shard in shards} == {(num_images // (batch_size * world_size), batch_size)}
    seen = np.concatenate(shards).ravel()
    assert len(np.unique(seen)) == len(seen)


@pytest.mark.parametrize("repeats", [2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_repeats_deal_out_images_as_timm_does(monkeypatch, repeats, world_size):
    num_images, batch_size = 600, 16
    order = TrainOrder(num_images, batch_size, 0, 0, world_size, repeats)
    permutation = TrainOrder(num_images, 1, 0).batches(1).indices.ravel()
    # timm's sampler seeds its permutation by the epoch alone; everything after it is compared
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.from_numpy(permutation))
    for rank in range(world_size):
        sampler = RepeatAugSampler(range(num_images), world_size, rank, num_repeats=repeats)
        expected = list(sampler)[: len(order) * batch_size]
        mine = TrainOrder(num_images, batch_size, 0, rank, world_size, repeats).batches(1)
        assert mine.indices.ravel().tolist() == expected
        assert len(order) == len(sampler) // batch_size
        pairs = list(zip(mine.indices.ravel().tolist(), mine.copies.ravel().tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("num_images", [7, 15, 16, 17, 50])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_evaluation_shards_partition_the_images_in_equally_many_steps(num_images, world_size, batch_size):
    shards = [eval_batches(num_images, batch_size, rank, world_size) for rank in range(world_size)]
    assert len({len(shard) for shard in shards}) == 1
    assert all(0 < len(batch) <= batch_size for shard in shards for batch in shard)
    seen = np.concatenate([batch for shard in shards for batch in shard])
    assert sorted(seen) == list(range(num_images))


def test_too_few_evaluation_images_are_an_error():
    with pytest.raises(ValueError, match="3 evaluation images can't be shared by 4 processes"):
        eval_batches(3, 2, 3, 4)
