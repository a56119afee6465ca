"""Recipes hold the published values."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from tests.training.helpers import REPOSITORY

RECIPES = sorted(path.stem for path in (REPOSITORY / "configs" / "recipe").glob("*.yaml"))
DROP_PATH = {"tiny": 0.1, "small": 0.4, "base": 0.5}


def composed(*overrides):
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "configs")):
        return compose("train", overrides=list(overrides))


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_convnext_recipe_is_the_published_one(size):
    """Liu et al. 2022, appendix A.1, table 5; main.py and TRAINING.md of facebookresearch/ConvNeXt at 048efce."""
    config = composed(f"recipe=convnext_{size}", "data.root=/data/imagenet", "trainer.devices=8")
    assert config.model.model_name == f"convnext_{size}"
    assert config.model.drop_path_rate == DROP_PATH[size]
    assert config.model.ls_init_value == 1e-6
    optimizer = config.optimizer
    assert (optimizer.opt, optimizer.lr, optimizer.weight_decay) == ("adamw", 4e-3, 0.05)
    assert (list(optimizer.betas), optimizer.eps, optimizer.layer_decay) == ([0.9, 0.999], 1e-8, None)
    assert config.batch.global_size == 4096
    assert (config.epochs, config.scheduler.warmup_epochs, config.scheduler.min_lr) == (300, 20, 1e-6)
    assert (config.scheduler.sched, config.scheduler.warmup_lr) == ("cosine", 0)
    assert config.scheduler.warmup_reaches_peak is True
    augment = instantiate(config.augment)
    assert augment.auto_augment == "rand-m9-mstd0.5-inc1"
    assert (augment.mixup, augment.cutmix, augment.mixup_prob, augment.mixup_switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (augment.reprob, augment.remode, augment.recount) == (0.25, "pixel", 1)
    assert (augment.label_smoothing, augment.color_jitter, augment.repeats) == (0.1, 0.4, 1)
    assert (augment.interpolation, augment.test_interpolation, augment.crop_pct) == ("bicubic", "bicubic", 0.875)
    assert (config.data.image_size, augment.test_size) == (224, None)
    assert (config.ema.decay, config.ema.warmup) == (0.9999, False)
    assert (config.trainer.precision, config.trainer.gradient_clip_val) == ("32-true", None)
    assert config.loss.type == "ce"


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_convfirst_trains_as_convnext_does(size):
    ours, theirs = (composed(f"recipe={family}_{size}") for family in ("convfirst", "convnext"))
    for config in (ours, theirs):
        config.name = config.model.model_name = ""
    assert ours == theirs


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_line_wins_over_a_recipe(recipe):
    config = composed(f"recipe={recipe}", "data=synthetic", "epochs=7", "optimizer=sgd")
    assert config.data._target_.endswith("SyntheticDataModule")
    assert (config.epochs, config.optimizer.opt) == (7, "sgd")
    assert config.run_dir == f"runs/{recipe}"
