"""What a checkpoint refuses to be resumed with."""

import errno
import os
import resource
import signal
from types import SimpleNamespace

import pytest
import torch

from convfirst.training.checkpoint import AtomicCheckpointIO, Checkpointing, write_atomically


def trainer(batches, processes=1, accumulation=1):
    return SimpleNamespace(
        world_size=processes, num_training_batches=batches, accumulate_grad_batches=accumulation, global_step=0
    )


def resumed(tmp_path, position):
    """Checkpointing that was saved at `position` by one process with 20 batches an epoch."""
    before = Checkpointing(tmp_path)
    before._check_same_split(trainer(20))
    before.position = position
    after = Checkpointing(tmp_path)
    after.load_state_dict(before.state_dict())
    return after


@pytest.mark.parametrize("other", [trainer(80, accumulation=4), trainer(10, processes=2, accumulation=1)])
def test_another_split_inside_an_epoch_is_refused(tmp_path, other):
    with pytest.raises(ValueError, match="inside epoch 0 .*'batches of one process': 20.*data.batch_size"):
        resumed(tmp_path, (0, 10))._check_same_split(other)


def test_an_epochs_start_may_split_the_batch_otherwise(tmp_path):
    resumed(tmp_path, (1, 0))._check_same_split(trainer(80, accumulation=4))


def test_another_number_of_updates_is_refused_anywhere(tmp_path):
    with pytest.raises(ValueError, match="at an epoch's start .*trainer.limit_train_batches"):
        resumed(tmp_path, (1, 0))._check_same_split(trainer(5))


def test_the_same_split_goes_on(tmp_path):
    resumed(tmp_path, (0, 10))._check_same_split(trainer(20))


def test_a_failed_write_names_the_file_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")

    def full(file):
        file.write(b"new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=f"can't write {path}: .*No space left"):
        write_atomically(path, full)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_checkpoint_that_outgrows_the_disk_is_one_message(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="can't write .*step_00000001.ckpt"):
            AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(10_000)}, tmp_path / "step_00000001.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []
