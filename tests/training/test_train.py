"""Whole runs of the tiny configuration."""

import csv
import json
import math
import re
import subprocess

import pytest
import torch
from lightning import Callback

from convfirst.app.train import train
from convfirst.data.sample_tree import SampleTree
from convfirst.training import NonFiniteLossError
from tests.training.helpers import Dies, assert_same_weights, last_checkpoint, losses, start, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    train(tiny_config(root, "logger=default"))
    return root / "digits"


def rows(run):
    with open(run / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_its_results(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test_images"] == 360
    assert 0 <= summary["test"]["top1"] <= summary["test"]["top5"] <= 100
    assert {"top1_ema", "top5_ema", "loss_ema"} <= summary["test"].keys()
    assert summary["images_per_s"] > 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))


def test_every_update_and_every_epoch_is_logged(run):
    trained = [row for row in rows(run) if row["train/loss"]]
    assert [int(row["step"]) for row in trained] == list(range(1, 13))
    for name in ("train/lr", "speed/images_per_s", "speed/data_wait", "speed/tflops", "memory/peak_gib"):
        assert all(float(row[name]) >= 0 for row in trained)
    evaluated = [row for row in rows(run) if row["val/top1"]]
    assert [int(row["step"]) for row in evaluated] == [4, 8, 12]
    assert all(row["val/top1_ema"] and row["val/loss_ema"] for row in evaluated)


def test_checkpoints_are_plain_and_complete(run):
    checkpoint = last_checkpoint(run)  # read with weights_only=True
    assert type(checkpoint["config"]) is dict
    assert checkpoint["config"]["optimizer"]["lr"] == 4e-3
    assert checkpoint["config"]["model"]["num_classes"] == 10
    assert any(key.startswith("ema.module.") for key in checkpoint["state_dict"])
    assert not any("_orig_mod" in key for key in checkpoint["state_dict"])
    assert len(list((run / "checkpoints").glob("step_*.ckpt"))) == 2
    assert not list((run / "checkpoints").glob(".*"))


def test_seed_0_is_a_seed(tmp_path, run):
    train(tiny_config(tmp_path, "seed=0", "epochs=2", "run_id=zero"))
    train(tiny_config(tmp_path, "seed=1", "epochs=2", "run_id=one"))
    assert losses(tmp_path / "zero")[0] == losses(run)[0]
    assert losses(tmp_path / "one")[0] != losses(run)[0]


def test_accumulation_and_gradient_checkpointing_change_no_result(tmp_path):
    plain = ("model.drop_path_rate=0", "epochs=2", "augment=none")
    train(tiny_config(tmp_path, *plain, "run_id=accumulated"))
    train(tiny_config(tmp_path, *plain, "run_id=whole", "data.batch_size=64", "grad_checkpointing=true",
                      "trainer.limit_train_batches=4"))  # fmt: skip
    a, b = (last_checkpoint(tmp_path / run_id)["state_dict"] for run_id in ("accumulated", "whole"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)


def test_an_epoch_ends_with_a_whole_update(tmp_path):
    train(tiny_config(tmp_path, "epochs=2", "trainer.limit_train_batches=5"))  # two batches an update
    assert [int(row["step"]) for row in rows(tmp_path / "digits") if row["val/top1"]] == [2, 4]


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.precision=bf16-mixed"],
        ["ema=null"],
        ["trainer.gradient_clip_val=1.0"],
        ["trainer.deterministic=true"],
        ["loss.type=bce", "optimizer=lamb"],
        ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "data.eval_batch_size=16"],
    ],
)
def test_options_train(tmp_path, overrides):
    summary = train(tiny_config(tmp_path, "epochs=2", "trainer.limit_train_batches=2", *overrides))
    assert math.isfinite(summary["test"]["loss"])
    assert ("top1_ema" in summary["test"]) == ("ema=null" not in overrides)


def test_skipped_images_are_counted_in_the_summary(tmp_path):
    tree = tmp_path / "tree"
    SampleTree(num_classes=5, train_images=8, val_images=4, min_side=24, max_side=32).write(tree)
    bad = sorted((tree / "val").rglob("*.JPEG"))[4:8] + sorted((tree / "train").rglob("*.JPEG"))[:1]
    for path in bad:
        path.write_bytes(b"")
    options = ("data=image_folder", f"data.root={tree}", "data.num_workers=0", "augment=light", "data.batch_size=8")
    options += ("batch.global_size=8", "data.eval_batch_size=4", "epochs=2", "data.on_bad_image=skip")
    summary = train(tiny_config(tmp_path, *options))
    assert (summary["skipped_images"], summary["test_images"]) == (5, 16)
    assert summary["test_reader"] == "Pillow, bilinear"
    assert math.isfinite(summary["test"]["loss"])


class Poison(Callback):
    """Makes the weights NaN after update 5."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            torch.nn.init.constant_(module.model.head.fc.weight, float("nan"))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    poison = "+callbacks.poison={_target_:tests.training.test_train.Poison}"
    with pytest.raises(NonFiniteLossError, match=r"epoch 1, batch 2, update 5, lr 0\.00\d+"):
        train(tiny_config(tmp_path, poison))
    checkpoint = last_checkpoint(tmp_path / "digits")
    assert checkpoint["global_step"] == 4
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())


def test_the_best_score_survives_a_resume(tmp_path):
    """A later, worse epoch of the resumed run must not replace the best checkpoint."""
    ruin = "+callbacks.ruin={_target_:tests.training.test_train.RuinAfter,step:8}"
    die = "+callbacks.at={_target_:tests.training.helpers.AtUpdate,step:10,action:die,at:update}"
    with pytest.raises(Dies):
        train(tiny_config(tmp_path, die))
    best = (tmp_path / "digits" / "checkpoints" / "best.ckpt").read_bytes()
    step = torch.load(tmp_path / "digits" / "checkpoints" / "best.ckpt", weights_only=True)["global_step"]
    summary = train(tiny_config(tmp_path, ruin))
    assert summary["best_val"]["update"] == step
    assert (tmp_path / "digits" / "checkpoints" / "best.ckpt").read_bytes() == best


class RuinAfter(Callback):
    """Makes the model constant once `step` updates are done, so that later epochs score worse."""

    def __init__(self, step):
        self.step = step

    def on_validation_start(self, trainer, module):
        if trainer.global_step > self.step:
            for model in (module.model, module.ema.module):
                torch.nn.init.zeros_(model.head.fc.weight)
                torch.nn.init.zeros_(model.head.fc.bias)


def test_wandb_without_a_login_is_one_message(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for variable, value in (("HOME", str(tmp_path)), ("NETRC", str(tmp_path / "netrc")), ("WANDB_MODE", "online")):
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    process = start(tmp_path, "logger=wandb", stdin=subprocess.DEVNULL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in output, output
    assert re.search("error: logger=wandb: .*; or give logger.wandb.offline=true", output), output


def test_wandb_offline_is_one_run_across_a_resume(tmp_path):
    pytest.importorskip("wandb")
    options = ("logger=wandb", "logger.wandb.offline=true", "~logger.tensorboard", "epochs=2")
    with pytest.raises(Dies):
        train(tiny_config(tmp_path, *options, "+callbacks.at={_target_:tests.training.helpers.AtUpdate,step:5}"))
    train(tiny_config(tmp_path, *options))
    run = tmp_path / "digits"
    ids = {folder.name.rsplit("-", 1)[1] for folder in (run / "wandb").glob("offline-run-*")}
    assert ids == {(run / "wandb_id").read_text()} == {last_checkpoint(run)["wandb_id"]}
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2


def test_progressive_resizing_grows_the_images(tmp_path):
    resize = (
        "+callbacks.resize={_target_:convfirst.training.ProgressiveResize,min_size:16,max_size:32,"
        "start_epoch:0,end_epoch:2,multiple:16}"
    )
    sizes = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            sizes.append((trainer.current_epoch, batch[0].shape[-1]))

    from convfirst.app import train as app

    build = app.build_trainer

    def watched(config):
        trainer = build(config)
        trainer.callbacks.append(Watch())
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "build_trainer", watched)
        train(tiny_config(tmp_path, resize, "data=synthetic", "data.num_train_images=256", "data.num_val_images=16",
                          "data.num_classes=10", "augment=none", "data.image_size=32", "data.batch_size=32",
                          "data.eval_batch_size=16"))  # fmt: skip
    assert sorted(set(sizes)) == [(0, 16), (1, 16), (2, 32)] or sorted(set(sizes)) == [(0, 16), (1, 32), (2, 32)]


def test_same_seed_same_weights(tmp_path, run):
    train(tiny_config(tmp_path))
    assert_same_weights(last_checkpoint(tmp_path / "digits")["state_dict"], last_checkpoint(run)["state_dict"])
