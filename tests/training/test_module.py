import copy

import pytest
import timm
import torch

from convfirst.training import ClassificationModule
from convfirst.training.flops import forward_flops
from convfirst.training.module import _hits
from convfirst.training.seeding import step_seed


def module(**kwargs):
    model = timm.create_model("convfirst_atto", dims=[8, 16], depths=[1, 1], num_classes=10)
    settings = dict(num_classes=10, optimizer={"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05}, scheduler={})
    return ClassificationModule(model, **{**settings, "epochs": 2, "steps_per_epoch": 3, **kwargs})


def test_vectors_and_biases_are_not_decayed():
    groups = module().configure_optimizers().param_groups
    decayed = {group["weight_decay"]: {p.ndim for p in group["params"]} for group in groups}
    assert decayed[0.0] == {1}
    assert decayed[0.05] == {2, 4}


def test_layer_decay_lowers_the_rate_towards_the_stem():
    own = module(optimizer={"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.5})
    scale = {id(p): g["lr_scale"] for g in own.configure_optimizers().param_groups for p in g["params"]}
    assert scale[id(own.model.stem.conv1.weight)] < scale[id(own.model.head.fc.weight)] == 1.0


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_losses_take_class_numbers_and_distributions(kind):
    criterion = module(loss={"type": kind}).criterion
    logits, targets = torch.randn(4, 10), torch.tensor([1, 2, 3, 9])
    dense = torch.nn.functional.one_hot(targets, 10).float()
    torch.testing.assert_close(criterion(logits, targets), criterion(logits, dense))


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="loss.type='hinge' must be one of ce, bce"):
        module(loss={"type": "hinge"})


@pytest.mark.parametrize(("warmup", "step", "decay"), [(False, None, 0.9), (True, 1, 0.0), (True, 10**6, 0.9)])
def test_ema_moves_by_its_decay(warmup, step, decay):
    own = module(ema={"decay": 0.9, "warmup": warmup})
    before = own.ema.module.head.fc.weight.clone()
    torch.nn.init.ones_(own.model.head.fc.weight)
    own.ema.update(own.model, step=step)
    torch.testing.assert_close(own.ema.module.head.fc.weight, decay * before + (1 - decay))


def test_ema_needs_no_gradient_and_has_the_models_keys():
    own = module(ema={"decay": 0.9})
    assert not any(p.requires_grad for p in own.ema.parameters())
    assert own.ema.module.state_dict().keys() == own.model.state_dict().keys()


def test_compiling_leaves_the_keys_alone():
    own = module(compile={"mode": None})
    before = own.state_dict().keys()
    own.model.compile()
    assert own.state_dict().keys() == before


def test_hits_count_single_and_multiple_labels():
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5], [0.1, 0.2, 0.9]])
    assert _hits(logits, torch.tensor([1, 1, 2]), k=1).tolist() == [1, 0, 1]
    assert _hits(logits, torch.tensor([1, 2, 0]), k=2).tolist() == [1, 1, 0]
    several = torch.tensor([[0, 1], [2, -1], [-1, -1]])  # the last image has no label and doesn't count
    assert _hits(logits, several, k=1).tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flops_do_not_depend_on_the_models_dtype(dtype):
    model = timm.create_model("convfirst_atto")
    assert forward_flops(copy.deepcopy(model).to(dtype), 3, 64) == forward_flops(model, 3, 64) > 0


def test_a_steps_random_numbers_follow_from_where_it_stands():
    def draw(*place):
        step_seed(*place)
        return torch.rand(4).tolist()

    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    first = [draw(*place) for place in places]
    assert len({tuple(numbers) for numbers in first}) == len(places)
    assert [draw(*place) for place in reversed(places)] == first[::-1]


@pytest.mark.gpu
def test_a_steps_seed_reaches_the_gpu():
    torch.cuda.init()
    step_seed(0, 1, 2, 3)
    first = torch.rand(4, device="cuda")
    step_seed(0, 1, 2, 3)
    assert torch.equal(torch.rand(4, device="cuda"), first)
