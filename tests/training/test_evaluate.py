import json

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir

from convfirst.app.evaluate import evaluate
from convfirst.app.train import train
from convfirst.data.sample_tree import SampleTree
from tests.training.helpers import REPOSITORY, tiny_config


def config(*overrides):
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "configs")):
        return compose("evaluate", overrides=["trainer.accelerator=cpu", *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    train(tiny_config(root, "epochs=2"))
    return root / "digits"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree") / "imagenet"
    SampleTree(num_classes=6, train_images=2, val_images=3, min_side=40, max_side=64).write(root)
    return root


def test_a_run_on_ffcv_is_scored_on_an_image_tree(tmp_path, tree):
    pytest.importorskip("ffcv")
    from convfirst.data.ffcv_writer import Preset, write_beton
    from convfirst.data.image_tree import read_tree

    for split in ("train", "val"):
        write_beton(read_tree(tree / split), tmp_path / f"{split}.beton", Preset(24, jpeg=1.0, page_size=1 << 21))
    options = ("data=ffcv", f"data.root={tmp_path}", "data.num_workers=1", "data.batch_size=4", "batch.global_size=4")
    options += ("data.eval_batch_size=5", "augment=light", "epochs=2", "trainer.limit_train_batches=2")
    summary = train(tiny_config(tmp_path, *options, f"data.eval_root={tree}"))
    assert (summary["test_reader"], summary["test_images"]) == ("Pillow, bilinear", 18)
    run = tmp_path / "digits"
    result = evaluate(config(f"run={run}"))
    assert result["reader"] == "Pillow, bilinear"
    assert result["loss"] == pytest.approx(summary["test"]["loss_ema"], rel=1e-5)
    own = evaluate(config(f"run={run}", f"data.eval_root={tree}", "interpolation=bicubic"))
    assert own["reader"] == "Pillow, bicubic"
    assert own["loss"] != result["loss"]


@pytest.mark.parametrize(("weights", "suffix"), [("raw", ""), ("ema", "_ema"), ("auto", "_ema")])
def test_a_run_scores_as_it_did_at_its_end(tmp_path, run, weights, suffix):
    summary = json.loads((run / "summary.json").read_text())
    output = tmp_path / "result.json"
    result = evaluate(config(f"run={run}", f"weights={weights}", f"output={output}"))
    assert result["images"] == 360
    for key in ("top1", "top5", "loss"):
        assert result[key] == pytest.approx(summary["test"][f"{key}{suffix}"], rel=1e-5)
    assert json.loads(output.read_text()) == result


def test_the_resolution_can_be_chosen(run):
    assert evaluate(config(f"run={run}", "test_size=32"))["image_size"] == 32


def test_a_timm_model_is_evaluated_as_its_configuration_says(tmp_path, tree):
    model = timm.create_model("test_convnext", num_classes=6)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    result = evaluate(config("timm_model=test_convnext", f"pretrained={tmp_path}/weights.pth", f"data.root={tree}",
                             "num_classes=6", "data.num_workers=0"))  # fmt: skip
    own = timm.data.resolve_data_config(model=model, use_test_size=True)
    assert result["images"] == 18
    assert result["image_size"] == own["input_size"][-1]
    assert result["crop_pct"] == own["crop_pct"]


def test_other_classes_than_the_datas_are_refused(tree):
    with pytest.raises(ValueError, match="test_convnext has 1000 classes, the data 6"):
        evaluate(config("timm_model=test_convnext", "pretrained=false", f"data.root={tree}"))


def test_one_of_run_and_model_is_needed():
    with pytest.raises(ValueError, match="either run=.* or timm_model="):
        evaluate(config())


def test_a_crop_that_is_not_ours_is_refused(tree, monkeypatch):
    own = {"input_size": (3, 64, 64), "crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bicubic"}
    monkeypatch.setattr("timm.data.resolve_data_config", lambda **_: own)
    with pytest.raises(ValueError, match="test_convnext wants .* crop_mode='squash'; supported are square"):
        evaluate(config("timm_model=test_convnext", "pretrained=false", f"data.root={tree}"))
