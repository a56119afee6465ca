"""What a CPU can't run: half precision with a loss scale, synchronised batch norm, sharding through NCCL."""

import csv
import math
import os
import signal
import time
from contextlib import suppress

import pytest
import torch
from lightning import Callback

from convfirst.app.train import train
from convfirst.training import NonFiniteLossError
from convfirst.training.guard import StepGuard
from tests.training.helpers import finish, last_checkpoint, losses, start, tiny_config

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
TWO = ["trainer.accelerator=gpu", "trainer.devices=2"]


def column(run, name):
    with open(run / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def train_losses(run):
    return column(run, "train/loss")


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_learns(tmp_path, precision):
    options = (
        "trainer.accelerator=gpu",
        f"trainer.precision={precision}",
        "epochs=10",
        "trainer.limit_train_batches=1.0",
    )
    summary = train(tiny_config(tmp_path, *options))
    assert summary["precision"] == precision
    found = train_losses(tmp_path / "digits")
    assert all(map(math.isfinite, found))
    assert sum(found[-20:]) < 0.8 * sum(found[:20])


@two_gpus
def test_synchronised_batch_norm_sees_the_whole_batch(tmp_path, monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    options = ["+model.norm=batchnorm", "+model.drop_path_rate=0", "augment=none", "trainer.limit_train_batches=2"]
    options += ["epochs=2", "ema=null"]
    finish(start(tmp_path / "two", *options, *TWO, "sync_bn=true", "data.batch_size=32"))
    finish(start(tmp_path / "one", *options, "trainer.accelerator=gpu", "data.batch_size=64"))
    two, one = tmp_path / "two/digits", tmp_path / "one/digits"
    assert train_losses(two) == pytest.approx(train_losses(one), rel=1e-3)
    ours, theirs = last_checkpoint(two)["state_dict"], last_checkpoint(one)["state_dict"]
    statistics = [key for key in theirs if key.endswith(("running_mean", "running_var"))]
    assert statistics
    for key in statistics:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4)


@two_gpus
def test_a_sharded_run_goes_on_where_it_was_killed(tmp_path):
    options = ["trainer=fsdp", *TWO, "trainer.precision=bf16-mixed", "epochs=3", "data.batch_size=32"]
    finish(start(tmp_path / "whole", *options))
    kill = "+callbacks.at={_target_:tests.training.helpers.AtUpdate,step:7,action:SIGKILL,at:update}"
    killed = start(tmp_path / "cut", *options, kill, start_new_session=True)
    try:
        assert killed.wait(timeout=240) == -9
    finally:  # NCCL lets the other process wait for the dead one
        with suppress(ProcessLookupError):
            os.killpg(killed.pid, signal.SIGKILL)
    output, _ = killed.communicate()
    assert not (tmp_path / "cut/digits/summary.json").exists(), output
    assert "resuming from" in finish(start(tmp_path / "cut", *options))
    whole, cut = losses(tmp_path / "whole/digits"), losses(tmp_path / "cut/digits")
    assert [row[:2] for row in cut] == [row[:2] for row in whole]
    for a, b in zip(cut, whole, strict=True):
        assert [float(x or 0) for x in a[2:6]] == pytest.approx([float(x or 0) for x in b[2:6]], rel=0.02)


def test_the_guard_lets_the_host_run_one_step_ahead():
    guard, loss = StepGuard(), torch.zeros((), device="cuda")
    for where in "ab":
        guard.observe(loss, where)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    start = time.perf_counter()
    guard.observe(loss, "c")
    assert time.perf_counter() - start < 0.3
    torch.cuda.synchronize()
    guard.observe(loss / 0, "here")
    with pytest.raises(NonFiniteLossError, match="here"):
        guard.observe(loss, "later")


def test_a_slow_loader_is_seen_and_a_fast_one_is_not(tmp_path):
    options = ("trainer.accelerator=gpu", "epochs=2", "callbacks.checkpoint.every_n_steps=null")
    slow = "+callbacks.slow={_target_:tests.training.test_gpu.SlowBatches}"
    train(tiny_config(tmp_path / "fast", *options))
    train(tiny_config(tmp_path / "slow", *options, slow))
    fast, slow = (column(tmp_path / name / "digits", "speed/data_wait")[1:] for name in ("fast", "slow"))
    assert min(slow) > 0.5
    assert sorted(fast)[len(fast) // 2] < min(slow)


class SlowBatches(Callback):
    """Takes half a second over each batch."""

    def on_train_start(self, trainer, module):
        loader = trainer.datamodule.train_loader
        read = loader._read

        def slow(epoch, order):
            for batch in read(epoch, order):
                time.sleep(0.5)
                yield batch

        loader._read = slow
