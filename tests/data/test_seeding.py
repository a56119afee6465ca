import random

import numpy as np
import pytest
import torch

from convfirst.data.seeding import seed_of, seeded


def draws():
    return random.random(), float(np.random.rand()), torch.rand(1).item()  # noqa: NPY002


def test_keys_of_any_length_differ():
    keys = [(0,), (0, 0), (0, 0, 0), (1,), (0, 1), (1, 0), (0, 0, 1), (1, 2), (1, 2, 0), (1, 2, 0, 0, 0)]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and min(seeds) >= 0 and max(seeds) < 2**63


def test_all_three_generators_follow_the_key_and_come_back():
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    with seeded(0, 5):
        first = draws()
    with pytest.raises(KeyError), seeded(0, 5):
        assert draws() == first
        raise KeyError
    after = draws()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert draws() == after
    with seeded(0, 6):
        assert all(a != b for a, b in zip(draws(), first, strict=True))
