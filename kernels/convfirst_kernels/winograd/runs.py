"""Convolutions with the batch norm and the activation that follow them as one kernel, where weights are frozen.

What follows a convolution is read off a trace by torch.fx of the module that holds it. A trace takes one way through
any code, so only classes whose code has one way in evaluation mode are traced.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from convfirst_kernels.blocks import Unsupported, _activation, _batch_norm, check_hooks
from convfirst_kernels.winograd.swap import WinogradForward

_TRACED = {"BasicBlock", "Bottleneck", "ConvNormAct"}  # timm's and torchvision's, and every nn.Sequential


class RunsForward:
    """Stands in for the ``forward`` of a module that holds such convolutions.

    It lives in the module's ``__dict__``, where an attribute of that name hides the class's method. Where the module
    trains or a gradient may be asked for, the module's own code runs.
    """

    def __init__(self, module: nn.Module, traced: fx.GraphModule, runs: list[WinogradForward]):
        self.module = module
        self.traced = traced
        self.runs = runs

    def __call__(self, *x: Tensor, **named_x: Tensor) -> Tensor:
        module, (x,) = self.module, (*x, *named_x.values())  # classes name it as they like
        trains = module.training or any(run.norm is not None and run.norm.training for run in self.runs)
        if trains or (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *module.parameters()))):
            return type(module).forward(module, x)
        return self.traced(x)


class _Run(nn.Module):
    """A run as a module of the trace."""

    def __init__(self, forward: WinogradForward):
        super().__init__()
        self.forward = forward


class _Tracer(fx.Tracer):
    """Looks into no submodule."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def find_runs(model: nn.Module, convolutions: Sequence[nn.Conv2d]) -> list[RunsForward]:
    """A stand-in for each module that holds one of the ``convolutions`` with a batch norm or an activation behind it.

    The model has frozen weights and is in evaluation mode; modules with hooks inside are left alone.
    """
    found = []
    for module in model.modules():
        names = [name for name, child in module.named_children() if child in convolutions]
        stand_in = _trace(module, names) if names and _may_be_traced(module) else None
        found += [stand_in] if stand_in is not None and stand_in.runs else []
    return found


def _may_be_traced(module: nn.Module) -> bool:
    if "forward" in module.__dict__:
        return False  # somebody else's
    try:
        check_hooks(module)
    except Unsupported:
        return False
    known = not _TRACED.isdisjoint(cls.__name__ for cls in type(module).__mro__)
    return not module.training and (known or type(module).forward is nn.Sequential.forward)


def _trace(module: nn.Module, names: Sequence[str]) -> RunsForward | None:
    try:
        graph = _Tracer().trace(module)
    except Exception:  # code that can't be traced raises anything; it is left alone
        return None
    modules = dict(module.named_children())
    runs = []
    for node in [node for node in graph.nodes if node.op == "call_module" and node.target in names]:
        followers = list(_followers(node, modules))
        if followers:
            parts = [modules[follower.target] for follower in followers]
            norm = next((part for part in parts if _is_norm(part)), None)
            activation = next((part for part in parts if _is_activation(part)), None)
            runs.append(WinogradForward(modules[node.target], True, norm, activation))
            node.target = f"run_{node.name}"
            modules[node.target] = _Run(runs[-1])
            followers[-1].replace_all_uses_with(node)
            for follower in reversed(followers):
                graph.erase_node(follower)
    return RunsForward(module, fx.GraphModule(modules, graph), runs)


def _followers(node: fx.Node, modules: dict[str, nn.Module]) -> Iterator[fx.Node]:
    """At most one batch norm and then an activation, with identities among them, whose inputs nothing else needs."""
    passed, normed = [], False
    while len(node.users) == 1:
        (node,) = node.users
        if node.op != "call_module" or len(node.all_input_nodes) != 1:
            return
        part = modules[node.target]
        passed.append(node)
        if _is_activation(part) or (_is_norm(part) and not normed):
            yield from passed
            passed, normed = [], True
        if _is_activation(part) or not (_is_norm(part) or type(part) is nn.Identity):
            return


def _is_norm(module: nn.Module) -> bool:
    try:
        return _batch_norm("", module) is not None
    except Unsupported:
        return False


def _is_activation(module: nn.Module) -> bool:
    try:
        return bool(_activation(module))
    except Unsupported:
        return False
