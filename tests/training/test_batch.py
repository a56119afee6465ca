import pytest

from convfirst.training import BatchPlan, plan_batch


@pytest.mark.parametrize(
    ("given", "plan"),
    [
        (dict(global_size=4096, devices=8, nodes=1, per_device=128), BatchPlan(4096, 8, 128, 4)),
        (dict(global_size=4096, devices=8, nodes=4, per_device=128), BatchPlan(4096, 32, 128, 1)),
        (dict(global_size=4096, devices=8, nodes=1, accumulate=2), BatchPlan(4096, 8, 256, 2)),
        (dict(global_size=64, devices=1, nodes=1), BatchPlan(64, 1, 64, 1)),
        (dict(global_size=64, devices=2, nodes=1, per_device=16, accumulate=2), BatchPlan(64, 2, 16, 2)),
    ],
)
def test_the_missing_factor_is_derived(given, plan):
    assert plan_batch(**given) == plan


@pytest.mark.parametrize(
    ("given", "arithmetic"),
    [
        (dict(devices=8, per_device=128, accumulate=2), r"8 devices x 1 nodes .*128 .*2 = 2048, not 4096"),
        (dict(devices=3, per_device=128), r"3 devices x 1 nodes .*128 = 384 images: 4096 isn't a multiple"),
        (dict(devices=3), r"3 devices x 1 nodes x accumulate 1: 4096 / 3"),
    ],
)
def test_what_does_not_multiply_to_the_recipe_is_refused(given, arithmetic):
    with pytest.raises(ValueError, match=arithmetic):
        plan_batch(global_size=4096, nodes=1, **given)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_sizes_are_positive_integers(value):
    with pytest.raises(ValueError, match="data.batch_size="):
        plan_batch(global_size=64, devices=1, nodes=1, per_device=value)


def test_an_epoch_too_short_for_an_update_is_refused():
    with pytest.raises(ValueError, match=r"lower batch.global_size=4096"):
        BatchPlan(4096, 8, 128, 4).steps_per_epoch(num_batches=3)
