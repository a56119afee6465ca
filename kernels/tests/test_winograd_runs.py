"""Convolutions of frozen networks as one kernel with the batch norm and the activation behind them, on a CPU."""

import copy
import pickle

import pytest
import torch
from torch import nn

import convfirst_kernels as ck
from convfirst_kernels.winograd import swap
from convfirst_kernels.winograd.runs import RunsForward

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


@pytest.fixture(autouse=True)
def direct_on_a_cpu(monkeypatch):
    """Every swapped convolution runs as direct convolution, as on the GPU that was measured."""
    monkeypatch.setattr(swap, "choose", lambda conv, x, dtype: "direct")


@pytest.fixture
def activations(monkeypatch) -> list[str]:
    """The activation of each call of the operator."""
    seen = []
    operator = torch.ops.convfirst.direct_conv2d

    def noting(*arguments):
        seen.append(arguments[-1])
        return operator(*arguments)

    monkeypatch.setattr(torch.ops.convfirst, "direct_conv2d", noting)
    return seen


def randomised(net: nn.Module) -> nn.Module:
    """Frozen, in evaluation mode, with batch norms that are no identities."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def images(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 64, 64, generator=generator)
    return x.to(memory_format=torch.channels_last)


def holders(net: nn.Module) -> list[RunsForward]:
    forwards = (module.__dict__.get("forward") for module in net.modules())
    return [forward for forward in forwards if isinstance(forward, RunsForward)]


NETWORKS = {  # how to make it, its runs, those of them with an activation
    "timm's resnet18": (lambda: timm.create_model("resnet18"), 13, 5),
    "timm's resnet50": (lambda: timm.create_model("resnet50"), 13, 13),
    "torchvision's resnet50": (lambda: torchvision.models.resnet50(), 13, 13),
    "timm's vgg11": (lambda: timm.create_model("vgg11"), 8, 8),
    "torchvision's vgg11_bn": (lambda: torchvision.models.vgg11_bn(), 8, 8),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, seed, activations):
    create, runs, activated = NETWORKS[name]
    torch.manual_seed(seed)
    net = randomised(create())
    x, keys = images(seed), list(net.state_dict())
    expected = net(x)
    report = ck.accelerate(net, frozen=True)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert len(activations) == sum(row.swapped for row in report.convolutions) == runs
    assert activations.count("relu") == activated
    assert sum(len(holder.runs) for holder in holders(net)) == runs
    assert list(net.state_dict()) == keys
    ck.accelerate(net, frozen=False)
    assert not holders(net)
    ck.accelerate(net, frozen=True).undo()
    assert not holders(net) and torch.equal(net(x), expected)


@pytest.fixture
def chain() -> nn.Sequential:
    layers = [
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.Identity(),
        nn.SiLU(inplace=True),
        nn.MaxPool2d(2),
    ]
    return randomised(nn.Sequential(*layers))


def pixels(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 64, 8, 8, generator=generator).to(memory_format=torch.channels_last)


def test_a_chain(chain, seed, activations):
    x = pixels(seed)
    expected = chain(x)
    report = ck.accelerate(chain, frozen=True)
    assert "64 -> 64 channels, BatchNorm2d, SiLU" in str(report)
    torch.testing.assert_close(chain(x), expected, rtol=1e-4, atol=1e-5)
    assert activations == ["silu"]


def test_a_compiled_chain(chain, seed):
    x, graphs = pixels(seed), []
    expected = chain(x)
    ck.accelerate(chain, frozen=True)

    def noting(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(chain, fullgraph=True, backend=noting)(x), expected, rtol=1e-4, atol=1e-5)
    (names,) = graphs
    assert sum("direct_conv2d" in name for name in names) == 1
    assert not any(word in name for name in names for word in ("silu", "batch_norm"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_copies_have_runs_of_their_own(chain, seed, copied):
    x = pixels(seed)
    ck.accelerate(chain, frozen=True)
    other = copied(chain)
    assert torch.equal(other(x), chain(x))
    (holder,) = holders(other)
    assert holder.module is other and holder.runs[0].conv is other[0] and holder.runs[0].norm is other[1]


@pytest.mark.parametrize("why", ["training", "its norm trains", "gradient of x", "gradient of a weight"])
def test_its_own_code_where_it_trains(chain, seed, activations, why):
    x = pixels(seed)
    ck.accelerate(chain, frozen=True)
    if why == "training":
        chain.train()
    elif why == "its norm trains":
        chain[1].train()
    (x if why == "gradient of x" else chain[1].weight).requires_grad_("gradient" in why)
    plain = copy.deepcopy(chain)
    ck.accelerate(plain, kernels="off")
    assert torch.equal(chain(x), plain(x)) and not activations
    if "gradient" in why:
        chain(x).sum().backward()
        assert (x if why == "gradient of x" else chain[1].weight).grad is not None


def test_a_forward_of_somebody_else_stays(chain, seed):
    x = pixels(seed)
    chain.forward = own = lambda x: 2 * nn.Sequential.forward(chain, x)
    expected = chain(x)
    ck.accelerate(chain, frozen=True).undo()
    assert chain.forward is own and torch.equal(chain(x), expected)


def test_its_argument_has_a_name(chain, seed):
    x = pixels(seed)
    ck.accelerate(chain, frozen=True)
    assert holders(chain) and torch.equal(chain(input=x), chain(x))


def test_what_no_kernel_takes_runs_as_it_was(chain, seed, monkeypatch):
    x = pixels(seed)
    expected = chain(x)
    ck.accelerate(chain, frozen=True)
    monkeypatch.setattr(swap, "choose", lambda conv, x, dtype: None)
    assert torch.equal(chain(x), expected)


class Forked(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return self[1](y) + y


NO_RUNS = {
    "weights may change": (lambda: nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()), False),
    "code of its own": (lambda: Forked(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()), True),
    "nothing behind it": (lambda: nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()), True),
    "an activation that no kernel has": (lambda: nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Tanh()), True),
    "statistics of the batch": (
        lambda: nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64, track_running_stats=False)), True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", NO_RUNS)
def test_no_runs(why, seed):
    create, frozen = NO_RUNS[why]
    net, x = create().eval().requires_grad_(False), pixels(seed)
    expected = net(x)
    report = ck.accelerate(net, frozen=frozen)
    assert not holders(net) and [row.swapped for row in report.convolutions] == [True]
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_a_value_that_two_need_is_not_skipped(seed):
    """timm's block adds nothing between; one whose code adds the convolution's own result keeps its norm apart."""

    class Bottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()

        def forward(self, x):
            y = self.bn(self.conv(x))
            return self.act(y) + y

    net, x = randomised(Bottleneck()), pixels(seed)
    expected = net(x)
    ck.accelerate(net, frozen=True)
    (run,) = holders(net)[0].runs
    assert run.norm is net.bn and run.activation is None
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_hooks_are_still_called(chain, seed):
    seen = []
    chain[1].register_forward_hook(lambda *_: seen.append(1))
    ck.accelerate(chain, frozen=True)
    chain(pixels(seed))
    assert seen == [1] and not holders(chain)
