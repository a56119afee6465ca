"""The key `kernels`: fused kernels where they are to be had, and what happens where they aren't."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from convfirst.app import kernels

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
    with pytest.raises(RuntimeError, match="need a CUDA device, not cpu"):
        kernels.accelerate([torch.nn.Identity()], CPU, "required")


def test_another_choice_is_refused():
    with pytest.raises(ValueError, match="kernels='maybe' must be one of auto, required, off"):
        kernels.check_kernels("maybe")
