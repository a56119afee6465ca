"""Training with residual blocks as fused operators on a GPU."""

import copy
import math

import pytest
import timm
import torch

from convfirst.app.bare_loop import bare_loop
from convfirst.app.kernels import accelerate_training
from convfirst.app.train import train
from tests.training.helpers import assert_same_weights, finish, last_checkpoint, losses, start, tiny_config

pytest.importorskip("convfirst_kernels")

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
# widths that kernels cover
COVERED = ["model.dims=[32,64]", "data.image_size=32", "trainer.accelerator=gpu"]
ARCHITECTURES = {
    "convfirst_atto": dict(depths=(1, 1, 1, 1), dims=(32, 64, 128, 256)),
    "convnext_atto": dict(depths=(1, 1, 1, 1), dims=(96, 96, 192, 384)),
}


def run(root, *overrides):
    train(tiny_config(root, *COVERED, *overrides))
    return root / "digits"


def train_losses(run_dir):
    return [float(row[2]) for row in losses(run_dir) if row[2]]


def build(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.2, ls_init_value=0.5, **ARCHITECTURES[name])
    accelerate_training(
        [model.to("cuda", memory_format=torch.channels_last)], torch.device("cuda", 0), "required", "bf16-mixed"
    )
    return model


def images():
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randn(8, 3, 64, 64, device="cuda", generator=generator).to(memory_format=torch.channels_last)


def gradients(model, network):
    torch.manual_seed(2)
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = network(images()).float().square().mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_the_curve_is_that_of_plain_pytorch(tmp_path, precision):
    options = [f"trainer.precision={precision}", "trainer.gradient_clip_val=1.0", "model.drop_path_rate=0"]
    plain = train_losses(run(tmp_path / "plain", *options))
    fused = train_losses(run(tmp_path / "fused", *options, "kernels=required"))
    assert all(map(math.isfinite, fused))
    assert fused == pytest.approx(plain, rel=0.05, abs=0.02)


def test_runs_repeat_bit_by_bit_and_so_do_recomputed_blocks(tmp_path):
    options = ["trainer.precision=bf16-mixed", "trainer.deterministic=true", "kernels=required"]
    first = run(tmp_path / "first", *options)
    for name, more in (("second", []), ("recomputed", ["grad_checkpointing=true"])):
        again = run(tmp_path / name, *options, *more)
        assert_same_weights(last_checkpoint(again)["state_dict"], last_checkpoint(first)["state_dict"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_compiled_step_has_no_graph_break(name):
    torch.compiler.reset()
    model = build(name)
    loss, expected = gradients(model, model)
    compiled_loss, found = gradients(model, torch.compile(model, fullgraph=True))
    assert compiled_loss == pytest.approx(loss, rel=0.1)  # drop path draws otherwise in compiled code
    assert torch.isfinite(found).all() and found.norm().item() == pytest.approx(expected.norm().item(), rel=0.5)


def test_a_compiled_step_without_drop_path_gives_the_same_gradients():
    torch.compiler.reset()
    model = build("convfirst_atto").eval()  # drop path alone depends on it
    loss, expected = gradients(model, model)
    compiled_loss, found = gradients(model, torch.compile(model, fullgraph=True))
    assert compiled_loss == pytest.approx(loss, rel=0.02)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.99


def test_a_whole_step_in_a_cuda_graph():
    model = build("convfirst_atto").eval()
    other = copy.deepcopy(model)
    static = images()

    def make_step(network):
        update = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True, capturable=True)

        def step():
            with torch.autocast("cuda", torch.bfloat16):
                loss = network(static).float().square().mean()
            update.zero_grad(set_to_none=True)
            loss.backward()
            update.step()

        return step

    eager, captured = make_step(other), make_step(model)
    for _ in range(6):
        eager()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            captured()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()
    for _ in range(3):
        graph.replay()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("graph", [False, True])
def test_the_bare_loop_takes_kernels(graph):
    optimizer = {"opt": "adamw", "lr": 1e-3, "fused": True, "capturable": graph}
    short = dict(steps=2, warmup_steps=2, interval=1, compile=False, graph=graph, optimizer=optimizer)
    result = bare_loop("convfirst_atto", {}, batch=4, image_size=64, kernels="required", **short)
    assert result["images_per_s"] > 0 and result["peak_memory_gib"] > 0


@two_gpus
def test_two_gpus_train_as_one_with_twice_the_batch(tmp_path):
    options = ["epochs=2", "trainer.limit_train_batches=2", "augment=none", "+model.drop_path_rate=0", "ema=null"]
    options += ["+model.dims=[32,64]", *COVERED[1:], "trainer.precision=bf16-mixed", "kernels=required"]
    finish(start(tmp_path / "two", *options, "trainer.devices=2", "data.batch_size=32"))
    finish(start(tmp_path / "one", *options, "data.batch_size=64"))
    assert train_losses(tmp_path / "two/digits") == pytest.approx(train_losses(tmp_path / "one/digits"), rel=0.01)
