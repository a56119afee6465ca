"""Several processes on one machine, through the command that a person would type."""

import json
import signal
import time

import pytest
import torch
from omegaconf import OmegaConf

from convfirst.app.train import train
from tests.training.helpers import finish, last_checkpoint, losses, start, tiny_config

ONE_UPDATE = ["epochs=2", "trainer.limit_train_batches=1", "augment=none", "+model.drop_path_rate=0"]
ONE_UPDATE += ["batch.global_size=64"]
TWO = ["trainer.devices=2", "data.batch_size=32"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    root = tmp_path_factory.mktemp("alone")
    options = [o.replace("+model.drop", "model.drop") for o in ONE_UPDATE]
    train(tiny_config(root, *options, "data.batch_size=64"))
    return root / "digits"


STRATEGIES = {
    "ddp": [],
    "fsdp": ["trainer=fsdp", "trainer.precision=32-true"],
    "fsdp, compiled": ["trainer=fsdp", "trainer.precision=32-true", "compile.enabled=true"],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path, alone, strategy):
    finish(start(tmp_path, *ONE_UPDATE, *TWO, *STRATEGIES[strategy]))
    together = tmp_path / "digits"
    ours, theirs = last_checkpoint(together)["state_dict"], last_checkpoint(alone)["state_dict"]
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)
    for a, b in zip(losses(together), losses(alone), strict=True):
        assert [float(x or 0) for x in a] == pytest.approx([float(x or 0) for x in b], rel=1e-4)
    summary = json.loads((together / "summary.json").read_text())
    assert (summary["processes"], summary["test_images"]) == (2, 360)
    assert summary["test"] == pytest.approx(json.loads((alone / "summary.json").read_text())["test"], rel=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits"]  # no directories of the second process


def test_sigterm_to_one_of_two_processes_saves_and_ends_both(tmp_path):
    long = ["epochs=500", "trainer.devices=2", "callbacks.checkpoint.every_n_steps=null"]
    process = start(tmp_path, *long)
    try:
        metrics = tmp_path / "digits" / "metrics.csv"
        deadline = time.monotonic() + 200
        while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "SIGTERM: saved" in output
    assert last_checkpoint(tmp_path / "digits")["global_step"] > 0


def test_a_sweep_of_subprocess_ddp_is_refused(tmp_path):
    process = start(tmp_path, "-m", "seed=0,1", "trainer.devices=2")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "in a sweep (-m)" in output
    assert "Start one process a device" in output


def test_a_sweep_gives_each_job_its_run(tmp_path):
    finish(start(tmp_path, "-m", "seed=0,1", "epochs=2", "trainer.limit_train_batches=2"))
    runs = [path for path in tmp_path.iterdir() if path.name != "multirun"]
    assert sorted(OmegaConf.load(run / "config.yaml").seed for run in runs) == [0, 1]
