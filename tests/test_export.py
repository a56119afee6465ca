import json

import onnxruntime
import pytest
import timm
import torch
from omegaconf import OmegaConf

from convfirst.app.export import export, find_checkpoint, load_trained, preprocessing

MODEL = dict(
    _target_="timm.create_model",
    model_name="convfirst_atto",
    num_classes=10,
    in_chans=1,
    stem_stride=2,
    norm="batchnorm",
)
RUN = dict(
    model=MODEL,
    data=dict(_target_="convfirst.data.DigitsDataModule", image_size=32),
    augment=dict(_target_="convfirst.data.Augment", crop_pct=0.9),
)


def randomised(model_config: dict) -> torch.nn.Module:
    model = timm.create_model(**{k: v for k, v in model_config.items() if k != "_target_"})
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 0.3)
    return model.eval()


def write_checkpoint(path, models: dict, run: dict = RUN) -> None:
    state = {prefix + key: value for prefix, model in models.items() for key, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "config": run}, path)


def options(**kwargs):
    defaults = {"weights": "auto", "onnx": False, "hub": None, "hub_private": False}
    return OmegaConf.create({**defaults, **{k: str(v) for k, v in kwargs.items()}})


@pytest.mark.parametrize("weights, expected", [("auto", "ema.module."), ("ema", "ema.module."), ("raw", "model.")])
def test_timm_loads_the_export_with_equal_logits(tmp_path, weights, expected):
    models = {"model.": randomised(MODEL), "ema.module.": randomised(MODEL)}
    write_checkpoint(tmp_path / "run/checkpoints/best.ckpt", models)
    folder = export(options(checkpoint=tmp_path / "run", output=tmp_path / "out", weights=weights))
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    image = torch.randn(3, 1, 32, 32)
    assert torch.equal(loaded(image), models[expected](image))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_config_tells_the_preprocessing(tmp_path):
    write_checkpoint(tmp_path / "a.ckpt", {"model.": randomised(MODEL)})
    folder = export(options(checkpoint=tmp_path / "a.ckpt", output=tmp_path / "out"))
    config = json.loads((folder / "config.json").read_text())
    data = timm.data.resolve_data_config({}, model=timm.create_model(f"local-dir:{folder}", pretrained=True))
    assert config["architecture"] == "convfirst_atto"
    assert data["input_size"] == (1, 32, 32)
    assert data["crop_pct"] == 0.9
    assert len(data["mean"]) == len(data["std"]) == 1


def test_folder_of_images_may_be_gone(tmp_path):
    model = {**MODEL, "in_chans": 3}
    data = dict(_target_="convfirst.data.ImageFolderDataModule", root="/gone", image_size=64)
    augment = dict(_target_="convfirst.data.Augment", test_size=96)
    write_checkpoint(tmp_path / "a.ckpt", {"model.": randomised(model)}, dict(model=model, data=data, augment=augment))
    _, config = load_trained(tmp_path / "a.ckpt")
    assert preprocessing(config)["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    assert preprocessing(config)["input_size"] == (3, 64, 64)
    assert preprocessing(config)["test_input_size"] == (3, 96, 96)


def test_onnx_has_the_logits_at_any_batch(tmp_path):
    model = randomised(MODEL)
    write_checkpoint(tmp_path / "a.ckpt", {"model.": model})
    config = options(checkpoint=tmp_path / "a.ckpt", output=tmp_path / "out")
    config.onnx = True
    session = onnxruntime.InferenceSession(str(export(config) / "model.onnx"))
    image = torch.randn(5, 1, 32, 32)
    (logits,) = session.run(["logits"], {"image": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(image).detach(), rtol=1e-3, atol=1e-4)


def test_a_run_gives_its_best_checkpoint_or_its_newest(tmp_path):
    folder = tmp_path / "run/checkpoints"
    for name in ("step_00000002.ckpt", "step_00000010.ckpt"):
        write_checkpoint(folder / name, {})
    assert find_checkpoint(tmp_path / "run").name == "step_00000010.ckpt"
    write_checkpoint(folder / "best.ckpt", {})
    assert find_checkpoint(tmp_path / "run").name == "best.ckpt"


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(checkpoint="nowhere"), FileNotFoundError, "nowhere is neither a checkpoint file nor the folder of a run"),
        (dict(weights="average"), ValueError, "weights='average' is unknown; accepted: auto, ema, raw"),
        (dict(weights="ema"), ValueError, "weights='ema', but .*a.ckpt holds raw"),
        (dict(output="taken"), FileExistsError, "output=.*taken exists"),
    ],
)
def test_bad_options_leave_nothing_behind(tmp_path, monkeypatch, change, error, message):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "a.ckpt", {"model.": randomised(MODEL)})
    (tmp_path / "taken").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        export(options(**{"checkpoint": "a.ckpt", "output": "out", **change}))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_that_reads_back_differently_is_not_kept(tmp_path, monkeypatch):
    def save_other(*args, **kwargs):
        timm.models.save_for_hf(randomised(MODEL), *args, **kwargs)

    write_checkpoint(tmp_path / "a.ckpt", {"model.": randomised(MODEL)})
    monkeypatch.setattr("convfirst.app.export.save_for_hf", lambda model, *args, **kwargs: save_other(*args, **kwargs))
    with pytest.raises(RuntimeError, match="other logits"):
        export(options(checkpoint=tmp_path / "a.ckpt", output=tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


class Hub:
    """Stands for `huggingface_hub.HfApi`: takes what is uploaded, or refuses."""

    def __init__(self, accepts: bool = True) -> None:
        self.accepts, self.repositories, self.files = accepts, {}, {}

    def create_repo(self, repository, private, exist_ok):
        if not self.accepts:
            raise OSError("401 Unauthorized")
        self.repositories[repository] = (private, exist_ok)

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.files[repo_id] = sorted(path.name for path in folder_path.iterdir())


def test_an_export_is_uploaded_whole_where_asked(tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("convfirst.app.export.HfApi", lambda: hub)
    write_checkpoint(tmp_path / "a.ckpt", {"model.": randomised(MODEL)})
    export(options(checkpoint=tmp_path / "a.ckpt", output=tmp_path / "private"))
    assert not hub.repositories
    export(options(checkpoint=tmp_path / "a.ckpt", output=tmp_path / "out", hub="me/digits"))
    assert hub.repositories.keys() == {"me/digits"}
    assert hub.files["me/digits"] == ["config.json", "model.safetensors"]


def test_a_refused_upload_says_where_the_export_is(tmp_path, monkeypatch):
    monkeypatch.setattr("convfirst.app.export.HfApi", lambda: Hub(accepts=False))
    write_checkpoint(tmp_path / "a.ckpt", {"model.": randomised(MODEL)})
    with pytest.raises(RuntimeError, match="out is written, but its upload to hub=me/digits failed: 401 Unauthorized"):
        export(options(checkpoint=tmp_path / "a.ckpt", output=tmp_path / "out", hub="me/digits"))
    assert (tmp_path / "out/model.safetensors").exists()
