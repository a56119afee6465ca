import numpy as np
import pytest
import torch

from convfirst.training.schedule import create_scheduler


def convnext_rates(base, final, epochs, steps, warmup_epochs):
    """utils.py `cosine_scheduler` of github.com/facebookresearch/ConvNeXt at 048efce."""
    warmup = np.linspace(0, base, warmup_epochs * steps)
    rest = np.arange(epochs * steps - warmup_epochs * steps)
    return np.concatenate([warmup, final + 0.5 * (base - final) * (1 + np.cos(np.pi * rest / len(rest)))])


def rates(scheduler, optimizer, updates):
    for update in updates:
        scheduler.step_update(update)
        yield optimizer.param_groups[0]["lr"]


def test_the_convnext_schedule_is_the_published_one_update_for_update():
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=4e-3)
    scheduler = create_scheduler(optimizer, 300, 7, "cosine", 20, 0.0, warmup_reaches_peak=True, min_lr=1e-6)
    np.testing.assert_allclose(
        list(rates(scheduler, optimizer, range(300 * 7))), convnext_rates(4e-3, 1e-6, 300, 7, 20), rtol=1e-9, atol=1e-15
    )


def test_a_rate_depends_on_the_number_of_the_update_alone():
    first, second = (torch.optim.SGD([torch.zeros(1)], lr=1.0) for _ in range(2))
    whole = list(rates(create_scheduler(first, 10, 5, warmup_epochs=2), first, range(50)))
    assert list(rates(create_scheduler(second, 10, 5, warmup_epochs=2), second, range(23, 50))) == whole[23:]


def test_layer_decay_scales_the_rate_of_a_group():
    groups = [{"params": [torch.zeros(1)], "lr_scale": 0.5}, {"params": [torch.zeros(1)], "lr_scale": 1.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    create_scheduler(optimizer, 10, 5, warmup_epochs=2).step_update(30)
    low, high = (group["lr"] for group in optimizer.param_groups)
    assert low == 0.5 * high > 0


@pytest.mark.parametrize("warmup", [10, 11, -1])
def test_a_warmup_as_long_as_the_run_is_refused(warmup):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    with pytest.raises(ValueError, match=f"scheduler.warmup_epochs={warmup}"):
        create_scheduler(optimizer, 10, 5, warmup_epochs=warmup)


@pytest.mark.parametrize("sched", ["step", "multistep", "plateau"])
def test_schedules_that_count_epochs_are_refused(sched):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=f"scheduler.sched='{sched}' .* accepted are schedules by update"):
        create_scheduler(optimizer, epochs=3, steps_per_epoch=10, sched=sched)
