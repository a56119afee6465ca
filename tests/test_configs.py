"""Every configuration composes and, where a CPU can, trains a batch."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from convfirst.app.train import train
from tests.data.shards import write_shards

CONFIGS = Path(__file__).parents[1] / "configs"
GROUPS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())
OPTIONS = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]

COMPOSE_ONLY = {
    "launcher=slurm": "submits to Slurm: tests/cluster",
    "trainer=gpu": "needs a GPU: tests/training/test_gpu.py",
    "trainer=ddp": "needs several processes: tests/training/test_distributed.py",
    "trainer=fsdp": "needs several processes: tests/training/test_distributed.py",
}
NEEDS = {"data=hugging_face": "datasets", "data=ffcv": "ffcv", "augment=convnext_ffcv": "ffcv", "logger=wandb": "wandb"}

# one update of two small images
ONE_BATCH = [
    "data.batch_size=2",
    "data.eval_batch_size=15",
    "data.image_size=32",
    "batch.global_size=2",
    "epochs=1",
    "scheduler.warmup_epochs=0",
    "trainer.accelerator=cpu",
    "trainer.limit_train_batches=1",
    "trainer.log_every_n_steps=1",
]
# what makes a model thin, and what reads the images an augmentation is for
THIN = {
    "resnet50": ["+model.layers=[1,1,1,1]"],
    "vgg19": ["+model.mlp_ratio=0.01", "ema=null", "optimizer=sgd"],
}
BLOCKS = ["+model.dims=[8,16,24,32]", "+model.depths=[1,1,1,1]"]
SOURCES = {"convnext": "image_folder", "light": "image_folder", "digits": "digits", "convnext_ffcv": "ffcv"}
SYNTHETIC = ["data.num_classes=5", "data.num_train_images=2", "data.num_val_images=2"]
TEST_IMAGES = {"synthetic": 2, "digits": 360}  # 15 in the trees
RECIPE_AUGMENT = {
    "digits": {"rotate": 0, "translate": 0, "zoom": 0},
    "convnext": {"auto_augment": "null", "hflip": 0, "scale": "null", "ratio": "null", "color_jitter": 0},
}


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


@pytest.fixture
def source_overrides(request, tree, tmp_path):
    """source_overrides(name): a few small images of that source."""

    def overrides(name):
        if name == "synthetic":
            return SYNTHETIC
        if name == "digits":
            return []
        if name == "ffcv":
            return [f"data.root={request.getfixturevalue('betons')}", "data.num_workers=1"]
        if name == "hugging_face":
            return [f"data.name={tree}", f"data.root={tmp_path / 'cache'}", "data.num_workers=0"]
        root = tree
        if name == "webdataset":
            root = tmp_path
            write_shards(tree, root, "train", "sample-train-{:04d}.tar")
            write_shards(tree, root, "val", "sample-validation-{:02d}.tar")
        return [f"data.root={root}", "data.num_workers=0"]

    return overrides


@pytest.mark.parametrize("option", [option for option in OPTIONS if option not in COMPOSE_ONLY])
def test_every_option_trains_a_batch(tmp_path, option, source_overrides):
    if option in NEEDS:
        pytest.importorskip(NEEDS[option])
    group, name = option.split("=")
    source = name if group == "data" else SOURCES.get(name, "synthetic") if group == "augment" else "synthetic"
    choices = {"data": source, "augment": "digits" if source == "digits" else "none", "logger": "csv", group: name}
    if group == "recipe":  # synthetic images take no augmentation before the batch
        del choices["augment"]
        off = RECIPE_AUGMENT["digits" if name == "digits" else "convnext"]
        choices |= {f"augment.{key}": value for key, value in off.items()}
    overrides = [f"{key}={value}" for key, value in choices.items()]
    thin = THIN.get(name, BLOCKS)
    summary = train(composed([*overrides, *ONE_BATCH, *thin, *source_overrides(source), f"run_root={tmp_path}/runs"]))
    assert summary["updates"] == 1
    assert summary["test_images"] == TEST_IMAGES.get(source, 15)


@pytest.mark.parametrize("model", ["resnet50", "vgg19"])
def test_a_model_takes_of_a_recipe_what_it_has(model):
    config = composed(["recipe=convnext_tiny", f"model={model}", *THIN[model]]).model
    assert (config.drop_path_rate, config.ls_init_value) == (0.1, 1e-6)
    assert instantiate(config, num_classes=5, _convert_="all").num_classes == 5
