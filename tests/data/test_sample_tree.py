"""The generated tree: what it holds, that it can be learnt, and that it is written whole or not at all."""

import errno
import filecmp

import numpy as np
import pytest
from PIL import Image

from convfirst.data.sample_tree import SampleTree, draw_image

SMALL = {"num_classes": 2, "train_images": 2, "val_images": 1, "min_side": 24, "max_side": 32}


def test_tree_has_the_asked_counts_and_sizes(tmp_path):
    SampleTree(**SMALL).write(tmp_path / "tree")
    files = sorted(str(path.relative_to(tmp_path / "tree")) for path in tmp_path.rglob("*.JPEG"))
    assert len(files) == 6 and files[0] == "train/n00000000/n00000000_0.JPEG"
    sides = [side for path in tmp_path.rglob("*.JPEG") for side in Image.open(path).size]
    assert min(sides) >= 24 and max(sides) <= 32
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_seed_alone_decides_the_images(tmp_path):
    for name, seed, workers in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        SampleTree(**SMALL, seed=seed).write(tmp_path / name, workers)
    first = "train/n00000000/n00000000_0.JPEG"
    assert filecmp.cmp(tmp_path / "a" / first, tmp_path / "b" / first, shallow=False)
    assert not filecmp.cmp(tmp_path / "a" / first, tmp_path / "c" / first, shallow=False)


def test_class_shows_in_the_colour():
    generator = np.random.default_rng(0)

    def features(label):
        image = draw_image(label, 3, 48, 48, generator).astype(float)
        colour = image - image.mean(2, keepdims=True)
        return colour.reshape(-1, 3).mean(0)

    means = np.array([np.mean([features(label) for _ in range(20)], axis=0) for label in range(3)])
    hits = [np.argmin(((features(label) - means) ** 2).sum(1)) == label for label in range(3) for _ in range(20)]
    assert np.mean(hits) > 0.9


def test_existing_folder_is_kept(tmp_path):
    (tmp_path / "tree").mkdir()
    with pytest.raises(FileExistsError, match="tree exists"):
        SampleTree(**SMALL).write(tmp_path / "tree")


def test_full_disk_leaves_nothing_and_names_the_tree(tmp_path, monkeypatch):
    saved = []

    def save(self, path, **options):
        if saved:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(path.write_bytes(b""))

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match=f"can't write the sample tree {tmp_path}/tree: No space left"):
        SampleTree(**SMALL).write(tmp_path / "tree")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, message",
    [({"num_classes": 0}, "num_classes=0"), ({"max_side": 8}, "max_side=8 is below"), ({"seed": -1}, "seed=-1")],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SampleTree(**options)
