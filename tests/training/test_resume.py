"""An interrupted run ends where the uninterrupted one does, bit for bit."""

import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from convfirst.app.run_dir import RunExistsError
from convfirst.app.train import train
from convfirst.data.sample_tree import SampleTree
from convfirst.training import StopRequested
from tests.data.betons import write_betons
from tests.training.helpers import (
    REPOSITORY,
    TINY,
    Dies,
    assert_same_weights,
    environment,
    last_checkpoint,
    losses,
    tiny_config,
)

AT = "+callbacks.at={_target_:tests.training.helpers.AtUpdate,step:%d,action:%s,at:%s}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    train(tiny_config(root))
    return root / "digits"


def check_same(whole, run):
    assert losses(run) == losses(whole)
    a, b = last_checkpoint(whole), last_checkpoint(run)
    assert_same_weights(a["state_dict"], b["state_dict"])
    torch.testing.assert_close(a["optimizer_states"], b["optimizer_states"], rtol=0, atol=0)
    assert a["callbacks"]["Checkpointing"] == b["callbacks"]["Checkpointing"]


@pytest.mark.parametrize(
    ("step", "at"), [(1, "update"), (4, "update"), (6, "update"), (8, "update"), (5, "validation"), (12, "update")]
)
def test_dying_anywhere_changes_nothing(tmp_path, whole, step, at):
    with pytest.raises(Dies):
        train(tiny_config(tmp_path, AT % (step, "die", at)))
    train(tiny_config(tmp_path))
    check_same(whole, tmp_path / "digits")


@pytest.mark.parametrize("wrong", ["scheduler.warmup_epochs=3", "optimizer.opt=nosuch"])
def test_a_command_that_trained_nothing_may_be_corrected(tmp_path, whole, wrong):
    with pytest.raises(ValueError):
        train(tiny_config(tmp_path, wrong))
    train(tiny_config(tmp_path))
    check_same(whole, tmp_path / "digits")


def test_dying_twice_changes_nothing(tmp_path, whole):
    for step in (5, 10):
        with pytest.raises(Dies):
            train(tiny_config(tmp_path, AT % (step, "die", "update")))
    train(tiny_config(tmp_path))
    check_same(whole, tmp_path / "digits")


def test_kill_9_changes_nothing(tmp_path, whole):
    command = [sys.executable, "train.py", *TINY, f"run_root={tmp_path}", AT % (7, "SIGKILL", "update")]

    killed = subprocess.run(command, cwd=REPOSITORY, env=environment())
    assert killed.returncode == -9
    train(tiny_config(tmp_path))
    check_same(whole, tmp_path / "digits")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_at_once_and_the_run_goes_on(tmp_path, whole, name):
    options = ("callbacks.checkpoint.every_n_steps=null", "logger=default")
    with pytest.raises(StopRequested) as stop:
        train(tiny_config(tmp_path, AT % (5, name, "update"), *options))
    assert stop.value.path.endswith("step_00000006.ckpt")  # the update in the making is finished first
    assert losses(tmp_path / "digits") == [row for row in losses(whole) if int(row[0]) <= 6]
    train(tiny_config(tmp_path, "logger=default"))
    check_same(whole, tmp_path / "digits")
    events = EventAccumulator(str(tmp_path / "digits" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))


def test_a_finished_run_is_not_trained_again(tmp_path, whole, capsys):
    before = (whole / "metrics.csv").read_bytes()
    train(tiny_config(whole.parent))
    assert "is finished" in capsys.readouterr().out
    assert (whole / "metrics.csv").read_bytes() == before


def test_another_configuration_is_refused_with_both_values(whole):
    with pytest.raises(RunExistsError, match=r"optimizer.lr: 0.004 -> 0.001"):
        train(tiny_config(whole.parent, "optimizer.lr=1e-3"))


def test_starting_anew_keeps_the_old_run(tmp_path):
    train(tiny_config(tmp_path, "epochs=2"))
    with pytest.raises(RunExistsError, match="overwrite=true"):
        train(tiny_config(tmp_path, "resume=never"))
    train(tiny_config(tmp_path, "resume=never", "overwrite=true"))
    assert len(losses(tmp_path / "digits.1")) < len(losses(tmp_path / "digits"))


def test_a_checkpoint_cut_short_is_passed_over(tmp_path, whole):
    with pytest.raises(Dies):
        train(tiny_config(tmp_path, AT % (7, "die", "update")))
    newest = max((tmp_path / "digits" / "checkpoints").glob("step_*.ckpt"))
    newest.write_bytes(newest.read_bytes()[:-100])
    train(tiny_config(tmp_path))
    check_same(whole, tmp_path / "digits")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("images") / "tree"
    SampleTree(num_classes=5, train_images=26, val_images=2, min_side=40, max_side=64).write(root)
    return root


@pytest.fixture(scope="module")
def betons(tree, tmp_path_factory):
    return write_betons(tree, tmp_path_factory.mktemp("ffcv"))


@pytest.mark.parametrize("source", ["image_folder", "ffcv"])
def test_other_sources_resume_inside_an_epoch(tmp_path, request, source):
    """130 images: four updates of two batches of 16, cropped, flipped, erased and mixed."""
    root = request.getfixturevalue("tree" if source == "image_folder" else "betons")
    augment = ("augment=light", "+augment.reprob=0.5", "+augment.remode=pixel", "+augment.mixup=0.8")
    options = (f"data={source}", f"data.root={root}", "data.num_workers=1", "data.image_size=32", *augment)
    options += ("data.batch_size=16", "batch.global_size=32", "epochs=2", "data.eval_batch_size=10")
    train(tiny_config(tmp_path / "whole", *options))
    with pytest.raises(Dies):
        train(tiny_config(tmp_path / "cut", *options, AT % (7, "die", "update")))
    train(tiny_config(tmp_path / "cut", *options))
    check_same(tmp_path / "whole" / "digits", tmp_path / "cut" / "digits")
