"""Export of a trained model: safetensors and config.json that timm loads, and ONNX."""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import timm
import torch
from huggingface_hub import HfApi
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf
from torch import nn

from convfirst.training.checkpoint import checkpoints

log = logging.getLogger(__name__)

_PREFIXES = {"raw": "model.", "ema": "ema.module."}
# Largest accepted difference of ONNX's logits, relative to the largest logit: both compute in float32.
_ONNX_TOLERANCE = 1e-3


def export(config: DictConfig) -> Path:
    """Write the model of ``config.checkpoint`` to the folder ``config.output``; return the folder.

    The folder holds model.safetensors and config.json, so that ``timm.create_model("local-dir:<folder>",
    pretrained=True)`` gives the trained model (after ``import convfirst``, for this package's own models), and
    model.onnx unless ``config.onnx`` is false. What was written is read back and its logits are compared first: a
    folder that exists is whole and right. With ``config.hub`` the folder is then uploaded to that repository of the
    Hugging Face hub, from where ``timm.create_model("hf-hub:<repository>", pretrained=True)`` gives the model.

    Raises:
        FileNotFoundError: there is no such checkpoint, or the run's folder holds none.
        FileExistsError: the output folder is there already.
        ValueError: ``config.weights`` is not one of auto, ema, raw, or the checkpoint has no such weights.
        RuntimeError: what was read back differs from the model, or the upload failed; the folder is there then.
    """
    for key in ("checkpoint", "output"):
        if OmegaConf.is_missing(config, key):
            raise ValueError(f"give {key}=...: export.py checkpoint=<run or checkpoint> output=<new folder>")
    output = Path(config.output)
    if output.exists():
        raise FileExistsError(f"output={output} exists; remove it or choose another folder")
    path = find_checkpoint(config.checkpoint)
    model, run_config = load_trained(path, config.weights)
    data_config = preprocessing(run_config)
    image = torch.randn(2, *data_config["input_size"], generator=torch.Generator().manual_seed(0))
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    for library in ("timm", "onnxscript", "onnx_ir"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        save_for_hf(model, str(temporary), safe_serialization=True, data_config=data_config)
        _check_timm(temporary, model, image)
        if config.onnx:
            _export_onnx(temporary / "model.onnx", model, image)
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors lets only the owner read
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("exported %s to %s", path, output)
    if config.hub is not None:
        upload(output, config.hub, config.hub_private)
    return output


def upload(folder: Path, repository: str, private: bool = False) -> None:
    """Upload a folder to the Hugging Face hub, into ``repository`` (user/name), which is made if it isn't there.

    ``private`` concerns a new repository. The login is the hub's own: ``hf auth login`` or HF_TOKEN.

    Raises:
        RuntimeError: the hub or the network refused.
    """
    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload model")
    except Exception as error:  # the hub's library raises its HTTP client's errors too
        raise RuntimeError(f"{folder} is written, but its upload to hub={repository} failed: {error}") from error
    log.info("uploaded %s to %s", folder, repository)


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint file as it is; for a run's folder its best checkpoint, or the newest where none is best."""
    path = Path(path)
    if path.is_file():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [p for p in [folder / "best.ckpt"] if p.is_file()] or checkpoints(folder)[-1:]
    if not found:
        raise FileNotFoundError(f"checkpoint={path} is neither a checkpoint file nor the folder of a run with one")
    return found[0]


def load_trained(path: Path, weights: str = "auto") -> tuple[nn.Module, DictConfig]:
    """The trained model in evaluation mode on the CPU, and the configuration of its run.

    ``weights`` picks the EMA's (``"ema"``), the optimiser's (``"raw"``), or the EMA's where there are any (``"auto"``).
    """
    if weights not in ("auto", *_PREFIXES):
        raise ValueError(f"weights={weights!r} is unknown; accepted: auto, ema, raw")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    config, state = OmegaConf.create(checkpoint["config"]), checkpoint["state_dict"]
    present = [name for name, prefix in _PREFIXES.items() if any(key.startswith(prefix) for key in state)]
    if weights == "auto":
        weights = "ema" if "ema" in present else "raw"
    if weights not in present:
        raise ValueError(f"weights={weights!r}, but {path} holds {', '.join(present) or 'no weights'}")
    prefix = _PREFIXES[weights]
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    config.model.pop("pretrained", None)  # those weights are overwritten
    model = instantiate(config.model, _convert_="all").eval()
    model.load_state_dict(state)
    return model, config


def preprocessing(config: DictConfig) -> dict:
    """How a run's evaluation prepares images, in timm's terms: input_size, mean, std, crop_pct, interpolation."""
    if "root" in config.data:  # on a disk that may be gone, and normalised as ImageNet unless the run says otherwise
        mean = config.data.get("mean", IMAGENET_DEFAULT_MEAN)
        std = config.data.get("std", IMAGENET_DEFAULT_STD)
    else:
        data = instantiate(config.data)
        mean, std = data.mean, data.std
    augment = instantiate(config.augment)
    size, test_size = config.data.image_size, augment.test_size or config.data.image_size
    return {
        "input_size": (config.model.in_chans, size, size),
        "test_input_size": (config.model.in_chans, test_size, test_size),
        "mean": tuple(mean),
        "std": tuple(std),
        "crop_pct": augment.crop_pct,
        "interpolation": augment.test_interpolation,
    }


@torch.no_grad()
def _check_timm(folder: Path, model: nn.Module, image: torch.Tensor) -> None:
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if not torch.equal(loaded(image), model(image)):
        raise RuntimeError("the model that timm reads back gives other logits")


@torch.no_grad()
def _export_onnx(path: Path, model: nn.Module, image: torch.Tensor) -> None:
    import onnxruntime

    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        model,
        (image,),
        path,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for images in (image[:1], image, torch.cat([image, image.flip(-1)])):
        expected = model(images).numpy()
        (actual,) = session.run(["logits"], {"image": images.numpy()})
        error = np.abs(actual - expected).max() / np.abs(expected).max()
        if not error < _ONNX_TOLERANCE:
            raise RuntimeError(
                f"onnxruntime's logits at batch {len(images)} differ by {error:.2g} of the largest logit"
            )
