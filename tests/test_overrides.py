"""A wrong override ends in one message that says what exists; a right one passes."""

import subprocess
import sys
from pathlib import Path

import pytest

from convfirst.app.overrides import check_overrides

REPOSITORY = Path(__file__).parents[1]
OPTIMIZER = "it has betas, eps, layer_decay, lr, opt, weight_decay"


def message(program, *arguments):
    with pytest.raises(SystemExit) as ended:
        check_overrides(REPOSITORY / "configs", program, arguments)
    assert "\n" not in ended.value.code
    return ended.value.code.removeprefix("error: ")


@pytest.mark.parametrize("option", [[], ["-m"], ["--cfg", "job"], ["launcher=slurm"]])
def test_a_wrong_key_names_those_of_its_node(option):
    expected = f"optimizer.lrr=1: optimizer has no key 'lrr' (did you mean optimizer.lr?); {OPTIMIZER}"
    assert message("train", *option, "optimizer.lrr=1") == expected


def test_a_wrong_key_at_top_level_names_keys_groups_and_the_closest_anywhere():
    for override in ("lrr=1", "lr=1"):
        text = message("train", override)
        assert text.startswith(
            f"{override}: the configuration has no key {override[:-2]!r} (did you mean optimizer.lr?)"
        )
        assert "it has augment, batch, callbacks," in text and " recipe, " in text and "hydra" not in text
    assert "(did you mean optimizer?)" in message("train", "optimiser=adamw")


@pytest.mark.parametrize(
    ("program", "override", "expected"),
    [
        (
            "evaluate",
            "data.rot=x",
            "data has no key 'rot' (did you mean data.root?); it has eval_batch_size, eval_root",
        ),
        ("export", "chekpoint=x", "(did you mean checkpoint?); it has checkpoint, hub, hub_private, onnx, output"),
        ("benchmark", "suit=x", "(did you mean suite?); it has append, blocks"),
        ("analyse", "bath=1", "(did you mean batch?); it has batch, ceilings"),
        ("measure_device", "sizes=1", "(did you mean size?); it has bytes, device"),
        ("reproduce", "papers=x", "(did you mean paper?); it has data, measure"),
    ],
)
def test_every_program_says_what_it_has(program, override, expected):
    assert expected in message(program, override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["~optimizer.foo"], f"~optimizer.foo: optimizer has no key 'foo'; {OPTIMIZER}"),
        (["+optimizer.lr=1"], "An item is already at 'optimizer.lr'."),
        (["epochs.foo=1"], "epochs.foo=1: epochs is 60 and has no keys"),
        (["+model.x=1", "modle.x=2"], "modle.x=2: the configuration has no key 'modle' (did you mean model?)"),
        (["launcher=slurm", "hydra.launcher.nods=2"], "(did you mean hydra.launcher.nodes?)"),
        (
            ["model=resnet"],
            "model=resnet: model has no option 'resnet' (did you mean resnet50?); it has convfirst_atto,",
        ),
        (["logger=[csv,foo]"], "logger=foo: logger has no option 'foo'; it has csv, default, tensorboard, wandb"),
        (["epochs"], "'epochs' can't be read: missing EQUAL at '<EOF>'; accepted: key=value, group=option,"),
        (["seed=[1"], "'seed=[1' can't be read: no viable alternative"),
    ],
)
def test_an_override_that_does_not_compose_is_named(overrides, expected):
    assert expected in message("train", *overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["epochs=abc"], "epochs=abc must be a whole number"),
        (["epochs=1.5"], "epochs=1.5 must be a whole number"),
        (["epochs=null"], "epochs=null must be a whole number"),
        (["++optimizer.lr=fast"], "++optimizer.lr=fast must be a number"),
        (["-m", "optimizer.lr=1e-3,fast"], "optimizer.lr=fast must be a number"),
        (["trainer.gradient_clip_val=abc"], "trainer.gradient_clip_val=abc must be a number"),
        (["sync_bn=1"], "sync_bn=1 must be true or false"),
        (["compile=true"], "compile=true must be null, or a node with the keys enabled, mode, dynamic"),
        (["augment=light", "augment.scale=1"], "augment.scale=1 must be a list, e.g. [a,b]"),
    ],
)
def test_a_value_of_another_type_is_named(overrides, expected):
    assert message("train", *overrides) == expected


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "recipe=convnext_tiny",
            "data.root=/data/imagenet",
            "trainer=gpu",
            "trainer.devices=8",
            "compile.enabled=true",
        ],
        ["-m", "seed=0,1", "optimizer.lr=1e-3,2e-3", "recipe=glob(*)"],
        ["logger.wandb.project=x", "logger=wandb"],
        ["+model.x.y=1", "model.x.y=2", "~logger.csv", "++foo.bar=1"],
        ["launcher=slurm", "hydra.launcher.partition=gpu", "trainer.num_nodes=4"],
        ["trainer=ddp", "trainer.devices=auto", "trainer.strategy=fsdp"],
        ["ema=null", "callbacks.checkpoint.every_n_steps=null", "scheduler.warmup_epochs=0.5", "epochs=${seed}"],
        ["--help"],
        ["--hydra-help"],
    ],
)
def test_what_is_right_passes(overrides):
    check_overrides(REPOSITORY / "configs", "train", overrides)


def test_hydra_has_the_only_word_on_request(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    check_overrides(REPOSITORY / "configs", "train", ["lrr=1"])


@pytest.mark.parametrize("script", ["train.py", "scripts/export.py"])
def test_a_script_ends_with_the_message_alone(script):
    command = [sys.executable, script, "data.rooot=x"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: data.rooot=x: ") and done.stderr.count("\n") == 1
    assert done.stdout == ""
