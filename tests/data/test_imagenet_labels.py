import json
from pathlib import Path

import numpy as np
import pytest
import torch

from convfirst.data.image_tree import ImageTree
from convfirst.data.imagenet_labels import check_imagenet_v2, read_real_labels, real_correct


def v2_tree(counts):
    targets = np.repeat(np.arange(len(counts)), counts)
    return ImageTree(Path("v2"), tuple(map(str, range(len(counts)))), np.array([b"x"] * len(targets)), targets)


def val_tree(numbers):
    files = np.array([f"n0/ILSVRC2012_val_{number:08d}.JPEG".encode() for number in numbers])
    return ImageTree(Path("val"), ("n0",), files, np.zeros(len(files), np.int64))


def test_imagenet_v2_counts():
    check_imagenet_v2(v2_tree([10] * 1000), 1000)
    with pytest.raises(ValueError, match="v2/7 holds 9 images, ImageNet-V2 has 10"):
        check_imagenet_v2(v2_tree([10] * 7 + [9] + [10] * 992), 1000)
    with pytest.raises(ValueError, match="v2 has 999 class folders"):
        check_imagenet_v2(v2_tree([10] * 999), 1000)
    with pytest.raises(ValueError, match="1000 classes, not 10"):
        check_imagenet_v2(v2_tree([10] * 1000), 10)


def test_real_labels_follow_the_file_names():
    order = np.random.default_rng(0).permutation(50_000)
    straight, shuffled = (read_real_labels(val_tree(numbers), 1000) for numbers in (range(1, 50_001), order + 1))
    assert np.array_equal(straight[order], shuffled)
    # Beyer et al. 2020: 46,837 of the 50,000 images keep a label
    assert ((straight >= 0).any(1)).sum() == 46_837 and straight.max() == 999


def test_real_labels_are_checked(tmp_path):
    tree, path = val_tree(range(1, 50_001)), tmp_path / "real.json"
    path.write_text(json.dumps([[0]] * 49_999))
    with pytest.raises(ValueError, match="real.json has 49999 entries"):
        read_real_labels(tree, 1000, str(path))
    path.write_text(json.dumps([[0]] * 49_999 + [[1000]]))
    with pytest.raises(ValueError, match="labels 0 to 1000; the model has 1000 classes"):
        read_real_labels(tree, 1000, str(path))
    path.write_text(json.dumps([[0]] * 50_000))
    with pytest.raises(ValueError, match="isn't named like ImageNet's validation images"):
        read_real_labels(val_tree([*range(1, 50_000), 50_001]), 1000, str(path))


def test_real_score_leaves_unlabelled_images_out():
    logits = torch.tensor([[0.0, 3.0, 2.0], [5.0, 1.0, 2.0], [1.0, 0.0, 2.0], [1.0, 0.0, 2.0]])
    targets = torch.tensor([[2, 1], [2, -1], [-1, -1], [1, -1]])
    assert real_correct(logits, targets, k=1) == (1, 3)
    assert real_correct(logits, targets, k=2) == (2, 3)
