"""Evaluation of a run's checkpoint, or of any timm model, on any test set."""

import difflib
import json
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from hydra.utils import instantiate
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf

from convfirst.app.export import find_checkpoint, load_trained
from convfirst.app.kernels import accelerate, check_kernels
from convfirst.data import Augment, ImageDataModule, ImageFolderDataModule
from convfirst.data.datamodule import bad_images
from convfirst.training import ClassificationModule
from convfirst.training.checkpoint import checkpoints, write_atomically


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Evaluate what `configs/evaluate.yaml` describes, print the result as JSON and write it to ``config.output``.

    Returns:
        top1, top5 (in %; top5 from five classes on), loss (cross-entropy; not with ReaL labels), images, image_size,
        crop_pct, interpolation, reader (what decoded and resized the images), test_set, skipped_images, and what was
        evaluated.

    Raises:
        ValueError: not exactly one of run and timm_model is given, or the model's classes aren't the data's.
        RuntimeError: an image wasn't evaluated exactly once.
    """
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")  # between Lightning and torch
    check_kernels(config.kernels, config.trainer.precision)
    if (config.run is None) == (config.timm_model is None):
        raise ValueError("give either run=<folder or checkpoint> or timm_model=<name>")
    evaluated, model, data = _from_run(config) if config.timm_model is None else _from_timm(config)
    if data.num_classes != model.num_classes:
        raise ValueError(f"{evaluated} has {model.num_classes} classes, the data {data.num_classes}")
    module = ClassificationModule(
        model,
        num_classes=data.num_classes,
        optimizer={},
        scheduler={},
        epochs=0,
        steps_per_epoch=0,
        channels_last=config.channels_last,
    )
    trainer = Trainer(
        **config.trainer,
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    accelerate([model.eval()], trainer.strategy.root_device, config.kernels)
    trainer.test(module, datamodule=data, verbose=False)
    result = {
        "evaluated": evaluated,
        **{key.removeprefix("test/"): float(value) for key, value in trainer.callback_metrics.items()},
        "images": module.images_evaluated,
        "image_size": data.eval_image_size,
        "crop_pct": data.augment.crop_pct,
        "interpolation": data.augment.test_interpolation,
        "reader": data.test_reader,
        "test_set": getattr(data, "test_set", type(data).__name__),
        "skipped_images": len(bad_images(data)),
    }
    if trainer.is_global_zero:
        text = json.dumps(result, indent=2)
        print(text)
        if config.output is not None:
            write_atomically(config.output, lambda file: file.write(text.encode() + b"\n"))
    return result


def _given(section: DictConfig) -> dict[str, Any]:
    return {key: value for key, value in OmegaConf.to_container(section).items() if value is not None}


def _preprocessing(config: DictConfig) -> dict[str, Any]:
    options = {"test_size": config.test_size, "crop_pct": config.crop_pct, "test_interpolation": config.interpolation}
    return {key: value for key, value in options.items() if value is not None}


def _from_run(config: DictConfig) -> tuple[str, nn.Module, ImageDataModule]:
    newest = checkpoints(Path(config.run) / "checkpoints")[-1:]
    path = newest[0] if newest else find_checkpoint(config.run)
    model, _ = load_trained(path, config.weights)
    run_config = OmegaConf.create(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["config"])
    augment = OmegaConf.merge(run_config.augment, _preprocessing(config))
    given = _given(config.data)
    eval_root = given.pop("eval_root", run_config.data.get("eval_root"))
    if eval_root is not None:
        return str(path), model, _image_tree(run_config.data, {**given, "root": eval_root}, instantiate(augment))
    data_config = OmegaConf.merge(run_config.data, given)
    return str(path), model, instantiate(data_config, augment=augment)


def _image_tree(run_data: DictConfig, given: dict[str, Any], augment: Augment) -> ImageFolderDataModule:
    """The image tree ``given["root"]`` for a run that was trained on another source, on FFCV for instance."""
    kept = ("eval_batch_size", "num_workers", "seed", "image_size", "mean", "std")
    options = {key: run_data[key] for key in kept if key in run_data}
    return ImageFolderDataModule(**{**options, **given}, augment=augment.evaluation())


def _from_timm(config: DictConfig) -> tuple[str, nn.Module, ImageDataModule]:
    if ":" not in config.timm_model and not timm.is_model(config.timm_model):  # hf-hub:... and local-dir:... are others
        close = ", ".join(difflib.get_close_matches(config.timm_model, timm.list_models(), 3)) or "none"
        raise ValueError(f"timm_model={config.timm_model!r} is unknown to timm; close to it: {close}")
    overlay = {} if config.num_classes is None else {"num_classes": config.num_classes}
    if isinstance(config.pretrained, str):
        overlay["file"] = config.pretrained
    model = timm.create_model(
        config.timm_model,
        pretrained=config.pretrained is not False,
        pretrained_cfg_overlay=overlay,
        num_classes=config.num_classes,
    )
    own = timm.data.resolve_data_config(model=model, use_test_size=True)
    _, height, size = own["input_size"]
    if height != size or own.get("crop_mode", "center") != "center":
        raise ValueError(
            f"{config.timm_model} wants input_size={own['input_size']} with crop_mode={own.get('crop_mode')!r}; "
            "supported are square images with crop_mode='center'"
        )
    augment = {"test_size": size, "crop_pct": own["crop_pct"], "test_interpolation": own["interpolation"]}
    given = _given(config.data)
    if "eval_root" in given:
        raise ValueError("data.eval_root goes with run=...; with timm_model=... give data.root")
    data = ImageFolderDataModule(
        **{"root": None, **given},
        augment={**augment, **_preprocessing(config)},
        image_size=size,
        mean=own["mean"],
        std=own["std"],
    )
    return config.timm_model, model, data
