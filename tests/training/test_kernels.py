"""The key `kernels`: fused kernels where they are to be had, and what happens where they aren't."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from convfirst.app import kernels
from convfirst.app.train import train
from tests.training.helpers import tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def package(monkeypatch):
    """Stands for the installed package; returns the calls it got."""
    calls = []

    def accelerate(model, kernels):
        calls.append((model, kernels))
        return "report"

    find = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "convfirst_kernels", SimpleNamespace(accelerate=accelerate))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "convfirst_kernels" or find(name))
    return calls


@pytest.fixture
def no_package(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "convfirst_kernels" else find(name))


def test_auto_uses_the_package_on_a_gpu(package):
    models = [torch.nn.Identity(), torch.nn.Identity()]
    kernels.accelerate(models, CUDA, "auto")
    assert package == [(model, "auto") for model in models]


@pytest.mark.parametrize(("device", "choice"), [(CPU, "auto"), (CPU, "off"), (CUDA, "off")])
def test_otherwise_the_model_is_left_alone(package, device, choice):
    kernels.accelerate([torch.nn.Identity()], device, choice)
    assert package == []


def test_auto_says_once_that_it_does_nothing(no_package, caplog):
    with caplog.at_level("INFO", logger="convfirst"):
        kernels.accelerate([torch.nn.Identity()], CUDA, "auto")
    assert len(caplog.messages) == 1
    assert "isn't installed" in caplog.messages[0]


def test_required_without_the_package_is_an_error(no_package):
    with pytest.raises(ModuleNotFoundError, match="kernels=required, but the package convfirst_kernels"):
        kernels.check_kernels("required")


def test_required_without_a_gpu_is_an_error(package):
    for check in (kernels.accelerate, lambda *rest: kernels.accelerate_training(*rest, precision="bf16-mixed")):
        with pytest.raises(ValueError, match="need a CUDA device, not cpu"):
            check([torch.nn.Identity()], CPU, "required")


@pytest.mark.parametrize("precision", ["32-true", "64-true", "32"])
def test_required_in_single_precision_is_refused_at_the_start(package, tmp_path, precision):
    with pytest.raises(ValueError, match=f"kernels=required, but trainer.precision={precision}: .*bf16-mixed"):
        train(tiny_config(tmp_path, "kernels=required", f"trainer.precision={precision}"))
    assert not list(tmp_path.iterdir())


def test_required_without_a_gpu_is_refused_before_training(package, tmp_path):
    with pytest.raises(ValueError, match="kernels=required, but the fused kernels need a CUDA device, not cpu"):
        train(tiny_config(tmp_path, "kernels=required", "trainer.precision=bf16-mixed"))
    assert not (tmp_path / "digits" / "metrics.csv").exists()


def test_required_for_a_model_that_the_kernels_do_not_cover_is_refused(package, monkeypatch):
    def accelerate(model, kernels):
        raise RuntimeError("stages.0 isn't covered")

    monkeypatch.setattr(sys.modules["convfirst_kernels"], "accelerate", accelerate)
    with pytest.raises(ValueError, match="stages.0 isn't covered"):
        kernels.accelerate([torch.nn.Identity()], CUDA, "required")


def test_another_choice_is_refused():
    with pytest.raises(ValueError, match="kernels='maybe' must be one of auto, required, off"):
        kernels.check_kernels("maybe")
