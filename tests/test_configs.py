"""Every configuration composes and trains a batch."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from convfirst.app.train import train

CONFIGS = Path(__file__).parents[1] / "configs"
GROUPS = ("augment", "callbacks", "data", "launcher", "logger", "model", "optimizer", "recipe", "scheduler", "trainer")
OPTIONS = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]

# one update of two small random images, in the recipe's model made thin
ONE_BATCH = [
    "data=synthetic",
    "data.batch_size=2",
    "data.eval_batch_size=2",
    "data.image_size=32",
    "data.num_classes=5",
    "data.num_train_images=2",
    "data.num_val_images=2",
    "batch.global_size=2",
    "epochs=1",
    "scheduler.warmup_epochs=0",
    "+model.dims=[8,16,24,32]",
    "+model.depths=[1,1,1,1]",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "logger=csv",
]
PIXELS = {"auto_augment": "null", "hflip": 0, "scale": "null", "ratio": "null", "color_jitter": 0}
DIGITS = {"rotate": 0, "translate": 0, "zoom": 0}


def composed(overrides):
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return compose("train", overrides=overrides)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_resolves(option):
    config = composed([option])
    assert OmegaConf.to_container(config, resolve=True, throw_on_missing=True)["run_dir"].startswith("runs/")


def test_a_wrong_option_lists_what_exists():
    with pytest.raises(MissingConfigException, match=r"(?s)Could not find 'recipe/convnet'.*convnext_tiny.*digits"):
        composed(["recipe=convnet"])


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (CONFIGS / "recipe").glob("*.yaml")))
def test_every_recipe_trains_a_batch(tmp_path, recipe):
    off = [f"augment.{key}={value}" for key, value in (DIGITS if recipe == "digits" else PIXELS).items()]
    summary = train(composed([f"recipe={recipe}", f"run_root={tmp_path}", *ONE_BATCH, *off]))
    assert summary["updates"] == 1
    assert summary["test_images"] == 2
