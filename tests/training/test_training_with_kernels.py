"""Training with residual blocks as fused operators, which compute their PyTorch reference on a CPU."""

import json
import logging

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from lightning import Callback
from torch import nn

from convfirst.app.evaluate import evaluate
from convfirst.app.kernels import accelerate_training
from convfirst.app.train import train
from tests.training.helpers import (
    REPOSITORY,
    Dies,
    assert_same_weights,
    finish,
    last_checkpoint,
    losses,
    start,
    tiny_config,
)

pytest.importorskip("convfirst_kernels")
from convfirst_kernels.acceleration import FusedForward

CPU = torch.device("cpu")
FUSED = "kernels=reference"
ONE_EPOCH = ["epochs=1", "scheduler.warmup_epochs=0"]


def run(root, *overrides):
    train(tiny_config(root, *overrides))
    return root / "digits"


def curve(run_dir):
    return [[float(x or 0) for x in row] for row in losses(run_dir)]


def fused_blocks(model):
    return [m for m in model.modules() if type(m.__dict__.get("forward")) is FusedForward]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Accumulation, drop path and EMA are the tiny run's own."""
    return run(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    return run(tmp_path_factory.mktemp("fused"), FUSED, "trainer.deterministic=true")


def test_the_curve_and_the_weights_are_those_of_plain_pytorch(plain, fused):
    assert curve(fused) == [pytest.approx(row, rel=1e-3, abs=1e-3) for row in curve(plain)]
    ours, theirs = last_checkpoint(fused)["state_dict"], last_checkpoint(plain)["state_dict"]
    assert list(ours) == list(theirs)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-2, atol=2e-3)


def test_runs_repeat_bit_by_bit(tmp_path, fused):
    again = run(tmp_path, FUSED, "trainer.deterministic=true")
    assert losses(again) == losses(fused)
    assert_same_weights(last_checkpoint(again)["state_dict"], last_checkpoint(fused)["state_dict"])


def test_recomputing_blocks_changes_nothing(tmp_path, fused):
    again = run(tmp_path, FUSED, "trainer.deterministic=true", "grad_checkpointing=true")
    assert_same_weights(last_checkpoint(again)["state_dict"], last_checkpoint(fused)["state_dict"])


@pytest.mark.parametrize(("first", "then"), [("reference", "off"), ("off", "reference")])
def test_a_run_goes_on_with_the_other_choice(tmp_path, plain, first, then):
    kill = "+callbacks.at={_target_:tests.training.helpers.AtUpdate,step:7}"
    with pytest.raises(Dies):
        run(tmp_path, f"kernels={first}", kill)
    assert curve(run(tmp_path, f"kernels={then}")) == [pytest.approx(r, rel=1e-3, abs=1e-3) for r in curve(plain)]


def test_evaluation_needs_no_kernels(fused):
    tested = json.loads((fused / "summary.json").read_text())["test"]
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "configs")):
        config = compose("evaluate", overrides=["trainer.accelerator=cpu", f"run={fused}", "kernels=off"])
    assert evaluate(config)["loss"] == pytest.approx(tested["loss_ema"], rel=1e-3)


def test_mixed_precision_clipping_and_layer_decay(tmp_path):
    options = ["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0", "+optimizer.layer_decay=0.8"]
    plain = curve(run(tmp_path / "plain", *options))
    mixed = run(tmp_path / "fused", *options, FUSED)
    assert curve(mixed) == [pytest.approx(row, rel=0.05, abs=0.05) for row in plain]
    state = last_checkpoint(mixed)["state_dict"]
    assert {value.dtype for key, value in state.items() if key.startswith("model.")} == {torch.float32}


FSDP = ["trainer=fsdp", "trainer.precision=32-true"]
STRATEGIES = {"ddp": [], "fsdp": FSDP, "fsdp, compiled": [*FSDP, "compile.enabled=true"]}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path, strategy):
    options = ["epochs=2", "trainer.limit_train_batches=1", "augment=none", "batch.global_size=64", FUSED]
    options += ["+model.drop_path_rate=0", "model.ls_init_value=0.5"]
    two = ["trainer.devices=2", "data.batch_size=32", *STRATEGIES[strategy]]
    assert "Grad strides do not match" not in finish(start(tmp_path / "two", *options, *two))
    alone = run(tmp_path / "one", *(o.lstrip("+") for o in options), "data.batch_size=64")
    assert curve(tmp_path / "two/digits") == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in curve(alone)]
    ours, theirs = last_checkpoint(tmp_path / "two/digits")["state_dict"], last_checkpoint(alone)["state_dict"]
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [[], ["grad_checkpointing=true"]], ids=["", "recomputed"])
def test_batch_norm_trains_as_in_plain_pytorch(tmp_path, options):
    options = ["+model.norm=batchnorm", *ONE_EPOCH, *options]
    plain, fused = run(tmp_path / "plain", *options), run(tmp_path / "fused", *options, FUSED)
    assert curve(fused) == [pytest.approx(row, rel=1e-3, abs=1e-3) for row in curve(plain)]
    ours, theirs = last_checkpoint(fused)["state_dict"], last_checkpoint(plain)["state_dict"]
    assert [key for key in theirs if key.endswith("expand_norm.num_batches_tracked")]
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-2, atol=2e-3, msg=key)


def test_synchronised_batch_norm_runs_the_blocks_own_code(caplog):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(timm.create_model("convfirst_atto", norm="batchnorm"))
    with caplog.at_level(logging.INFO):
        accelerate_training([model], CPU, "reference", "32-true")
    assert "now its own PyTorch code: SyncBatchNorm in training mode needs the statistics of all pro" in caplog.text


def test_required_names_the_block_whose_batch_norm_it_cannot_train(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("convfirst.app.kernels._check_device", lambda *_: None)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(timm.create_model("convfirst_atto", norm="batchnorm"))
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0 \(ConvFirstBlock\): SyncBatchNorm in training mode"):
        accelerate_training([model], CPU, "required", "bf16-mixed")
    assert not fused_blocks(model)


def test_auto_trains_plainly_in_single_precision_and_says_so(caplog):
    model = timm.create_model("convfirst_atto")
    with caplog.at_level("INFO", logger="convfirst"):
        accelerate_training([model], torch.device("cuda", 0), "auto", "32-true")
    assert caplog.messages == ["kernels=auto: trainer.precision=32-true, training runs in plain PyTorch"]
    assert not fused_blocks(model)


def test_the_reference_computes_on_a_cpu_alone():
    with pytest.raises(ValueError, match="kernels=reference computes on a CPU, not on cuda:0"):
        accelerate_training([timm.create_model("convfirst_atto")], torch.device("cuda", 0), "reference", "bf16-mixed")


FAMILIES = ["convfirst_atto", "convnext_atto"]


def build(name):
    options = dict(depths=(1, 1, 1, 1), dims=(16, 16, 24, 32), num_classes=5, drop_path_rate=0.2, ls_init_value=0.5)
    model = timm.create_model(name, **options).to(memory_format=torch.channels_last)
    accelerate_training([model], CPU, "reference", "bf16-mixed")
    assert len(fused_blocks(model)) == 4
    return model


def gradients(model, network):
    torch.manual_seed(0)
    model.zero_grad()
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss = network(images).float().square().mean()
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_compiled_step_has_no_graph_break(name):
    torch._dynamo.reset()
    model = build(name)
    loss, expected = gradients(model, model)
    compiled_loss, found = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert compiled_loss == pytest.approx(loss, rel=0.02)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * float(b.abs().max() + 1e-6))


@pytest.mark.parametrize("name", FAMILIES)
def test_recomputed_blocks_give_the_same_gradients(name):
    model = build(name)
    loss, expected = gradients(model, model)
    model.set_grad_checkpointing(True)
    assert gradients(model, model)[0] == loss
    for a, b in zip(gradients(model, model)[1], expected, strict=True):
        assert torch.equal(a, b)


def kept_for_backward(autocast):
    """Bytes that a block keeps for the backward; those of its input there, of a float32 a pixel and of its weights."""
    model = timm.create_model("convfirst_atto", depths=(1,), dims=(16,), drop_path_rate=0.5, ls_init_value=0.5)
    accelerate_training([model], CPU, "reference", "bf16-mixed")
    x = torch.randn(4, 16, 32, 32).to(memory_format=torch.channels_last).requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", enabled=autocast):
        model.stages[0].blocks[0](x)
    weights = 4 * sum(p.numel() for p in model.stages[0].parameters())
    return sum(kept.values()), x.nbytes / (2 if autocast else 1), 4 * x.numel() // x.shape[1], weights


@pytest.mark.parametrize("autocast", [False, True])
def test_a_block_keeps_no_more_than_its_input_for_the_backward_pass(autocast, monkeypatch):
    """Where it does not keep the normalised convolution."""
    monkeypatch.setattr("convfirst_kernels.kept.ENABLED", False)
    kept, x, _, weights = kept_for_backward(autocast)
    assert kept <= x + 2 * weights


@pytest.mark.parametrize("autocast", [False, True])
def test_a_block_that_keeps_the_normalised_convolution_keeps_nothing_else(autocast):
    """It, the block's input, a reciprocal deviation a pixel, and weights."""
    kept, x, deviations, weights = kept_for_backward(autocast)
    assert kept <= 2 * x + deviations + weights


def test_evaluation_sees_weights_that_a_fused_optimiser_changed():
    """It leaves their version counters alone, by which kept weights are told to be stale."""
    model = timm.create_model("convfirst_atto", depths=(1, 1), dims=(16, 32), num_classes=5, ls_init_value=0.5)
    accelerate_training([model], CPU, "reference", "32-true")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    images = torch.randn(4, 3, 32, 32)
    for _ in range(2):
        model.eval()
        with torch.no_grad():
            before = model(images)
        model.train()(images).square().mean().backward()
        optimizer.step()
    block = model.stages[0].blocks[0].eval()
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(block(x), type(block).forward(block, x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model.eval()(images), before)


class Records(Callback):
    """Fails the run unless its blocks are fused, in training and in the average that evaluation uses."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        assert len(fused_blocks(module.model)) == len(fused_blocks(module.ema.module)) == 2


def test_the_trained_model_and_its_average_are_fused(tmp_path):
    watch = "+callbacks.watch={_target_:tests.training.test_training_with_kernels.Records}"
    run(tmp_path, FUSED, *ONE_EPOCH, "trainer.limit_train_batches=2", watch)
