"""FFCV: same images as image_folder, exact resumption, refusals instead of hangs, files that are whole or not there."""

import math
import resource
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from convfirst.data.image_tree import ImageTree, read_tree

pytest.importorskip("ffcv")

from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.transforms import NormalizeImage, ToTensor, ToTorchImage

from convfirst.data import ffcv_writer
from convfirst.data.ffcv_file import _read_tables, open_beton
from convfirst.data.ffcv_loader import (
    BetonReader,
    CentreCropDecoder,
    FFCVError,
    RandomCropDecoder,
    draw_keys,
)
from convfirst.data.ffcv_writer import Preset, StoredImages, WriteError, estimate_bytes, write_beton

SMALL = Preset(36, jpeg=0.0, page_size=1 << 21)


def read(loader):
    return [(images.clone(), targets.clone()) for images, targets in loader]


def test_evaluation_equals_image_folder(make_data):
    images, targets = (torch.cat(part) for part in zip(*make_data("ffcv").val_dataloader(), strict=True))
    expected, labels = (torch.cat(part) for part in zip(*make_data("image_folder").val_dataloader(), strict=True))
    assert torch.equal(targets, labels) and targets.bincount().tolist() == [5, 5, 5]
    assert torch.equal(images, expected)  # stored uncompressed at the evaluation's resize


def test_the_test_reads_an_image_tree_through_pillow_where_one_is_given(make_data, tree, tmp_path):
    for split in ("train", "val"):
        write_beton(read_tree(tree / split), tmp_path / f"{split}.beton", Preset(36, jpeg=1.0, page_size=1 << 21))
    data = make_data("ffcv", root=str(tmp_path), eval_root=str(tree))
    images, targets = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    expected, labels = (torch.cat(part) for part in zip(*make_data("image_folder").test_dataloader(), strict=True))
    assert torch.equal(images, expected) and torch.equal(targets, labels)
    assert data.num_test_images == 15
    assert data.test_reader == "Pillow, bicubic"
    assert make_data("ffcv").test_reader == "FFCV, area averaging"
    validated = torch.cat([images for images, _ in data.val_dataloader()])
    assert not torch.equal(validated, expected)  # still from the file


def test_an_image_tree_of_other_classes_or_none_is_refused(make_data, tree, tmp_path):
    shutil.copytree(tree / "val", tmp_path / "val")
    (tmp_path / "val" / "n00000002").rename(tmp_path / "val" / "n00000009")
    with pytest.raises(ValueError, match="classes differ: .*val.beton has 3, .*/val has 3, or their names"):
        make_data("ffcv", eval_root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="data.eval_root=.*nowhere: no such folder"):
        make_data("ffcv", eval_root=str(tmp_path / "nowhere"))


def test_a_thread_that_hangs_is_an_error_that_names_file_and_batch(betons, monkeypatch):
    operations = [CentreCropDecoder(32, 1.0), ToTensor(), ToTorchImage()]
    reader = BetonReader(betons / "val.beton", operations, 4, 1, 1)
    batches = [np.arange(4, dtype=np.uint64)] * 4
    assert len(list(reader.read(batches, torch.device("cpu")))) == 4  # compiles
    reader.timeout = 1
    run, release = EpochIterator.run_pipeline, threading.Event()

    def hang(self, batch, *args):
        if batch == 2:
            release.wait(60)
        return run(self, batch, *args)

    monkeypatch.setattr(EpochIterator, "run_pipeline", hang)
    read = reader.read(batches, torch.device("cpu"))
    try:
        assert next(read) and next(read)
        with pytest.raises(TimeoutError, match=r"val.beton hangs: batch 2 of this pass .* data.timeout=1 s"):
            next(read)
    finally:
        release.set()


def test_a_timeout_that_is_none_is_refused(make_data):
    with pytest.raises(ValueError, match="data.timeout=0 must be a number of seconds above 0, or null"):
        make_data("ffcv", timeout=0)


def test_jpeg_evaluation_is_close_to_image_folder(make_data, tree, tmp_path):
    for split in ("train", "val"):
        write_beton(read_tree(tree / split), tmp_path / f"{split}.beton", Preset(36, jpeg=1.0, page_size=1 << 21))
    images = torch.cat([images for images, _ in make_data("ffcv", root=str(tmp_path)).val_dataloader()])
    expected = torch.cat([images for images, _ in make_data("image_folder").val_dataloader()])
    # chroma subsampling blurs the borders of the saturated shapes
    assert (images.float() - expected.float()).abs().mean() < 6


def test_batches_do_not_depend_on_the_threads(make_data):
    loader = make_data("ffcv").train_dataloader()
    epochs = [read(loader), read(loader)]
    parallel = make_data("ffcv", num_workers=2).train_dataloader()
    parallel.set_position(0, 5)
    for batches in (epochs[0][5:], epochs[1]):
        for (images, targets), (others, labels) in zip(batches, read(parallel), strict=True):
            assert torch.equal(images, others) and torch.equal(targets, labels)


def test_batches_stay_as_they_were_handed_out(make_data):
    loader = make_data("ffcv").train_dataloader()
    kept = list(loader)
    loader.set_position(0)
    for (images, _), (others, _) in zip(kept, read(loader), strict=True):
        assert torch.equal(images, others)


def test_two_loaders_run_at_once(make_data):
    data = make_data("ffcv", num_workers=2)
    expected = read(data.train_dataloader())
    training = iter(data.train_dataloader())
    mixed = [next(training)]
    assert sum(len(targets) for _, targets in data.val_dataloader()) == 15
    mixed += list(training)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(mixed, expected, strict=True))


def test_an_abandoned_epoch_ends_its_thread(make_data):
    before = threading.active_count()
    iteration = iter(make_data("ffcv").train_dataloader())
    next(iteration)
    iteration.close()
    assert threading.active_count() == before


def test_torchs_number_of_threads_is_kept(make_data):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        read(make_data("ffcv", num_workers=2).val_dataloader())
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_random_crops_follow_torchvisions_distribution():
    crop = RandomCropDecoder(32, (0.1, 1.0), (0.75, 4 / 3), 0.5)
    with np.errstate(over="ignore"):
        function = crop.make_crop()
        indices = np.arange(4000)
        boxes = np.array([function(60, 90, key) for key in draw_keys(0, 0, indices, 0 * indices)])
    top, left, rows, columns, flip = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + rows <= 60).all() and (left + columns <= 90).all()
    torch.manual_seed(0)
    image = torch.empty(3, 60, 90)
    other = np.array([RandomResizedCrop.get_params(image, [0.1, 1.0], [0.75, 4 / 3]) for _ in range(4000)])
    assert abs(flip.mean() - 0.5) < 0.03
    for mine, theirs in zip((top, left, rows, columns), other.T, strict=True):
        assert abs(mine.mean() - theirs.mean()) < 1.2 and abs(mine.std() - theirs.std()) < 1.2


@pytest.mark.parametrize("height, width", [(36, 36), (36, 61), (80, 37), (5, 400)])
@pytest.mark.parametrize("narrow, wide", [(0.75, 4 / 3), (2.0, 3.0)])
def test_impossible_crops_fall_back_to_the_centre(height, width, narrow, wide):
    crop = RandomCropDecoder(32, (4.0, 5.0), (narrow, wide), 0.0).make_crop()
    with np.errstate(over="ignore"):
        top, left, rows, columns, _ = crop(height, width, np.uint64(7))
    assert 0 <= top <= top + rows <= height and 0 <= left <= left + columns <= width
    limited = min(max(width / height, narrow), wide)
    assert math.isclose(columns / rows, limited, rel_tol=0.15)


def test_keys_differ_by_seed_epoch_and_copy():
    indices = np.arange(1000)
    keys = [draw_keys(*args) for args in ((0, 0, indices, 0 * indices), (0, 1, indices, 0 * indices))]
    keys += [draw_keys(1, 0, indices, 0 * indices), draw_keys(0, 0, indices, 0 * indices + 1)]
    assert len(np.unique(np.concatenate(keys))) > 3990
    assert all(np.array_equal(k & np.uint64(0xFFFFFFFF), indices) for k in keys)


def test_compiled_after_torch_operation_is_refused(betons):
    normalise = NormalizeImage(np.zeros(3), np.ones(3), np.float32)
    with pytest.raises(ValueError, match="NormalizeImage is compiled and stands after ToTorchImage"):
        BetonReader(betons / "val.beton", [CentreCropDecoder(32, 1.0), ToTensor(), ToTorchImage(), normalise], 4, 1, 2)


def test_an_error_in_the_thread_surfaces(make_data, monkeypatch):
    monkeypatch.setattr(EpochIterator, "run_pipeline", lambda self, *args: 1 // 0)
    with pytest.raises(FFCVError, match="val.beton failed: ZeroDivisionError"):
        list(make_data("ffcv").val_dataloader())


def test_a_damaged_jpeg_stops_with_the_files_name(make_data, tree, tmp_path):
    path = tmp_path / "val.beton"
    write_beton(read_tree(tree / "val"), path, Preset(36, jpeg=1.0, page_size=1 << 21))
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\xd8\xff")
    content[start : start + 4] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(FFCVError, match=f"{path} failed.*the JPEG of this image .* can't be decoded\", 0"):
        list(make_data("ffcv", root=str(tmp_path)).val_dataloader())


@pytest.mark.parametrize("kept", [0, 10, 3000, 1 << 21, -1, -24 * 3])
def test_a_cut_off_file_is_refused(betons, tmp_path, kept):
    content = (betons / "val.beton").read_bytes()
    path = tmp_path / "val.beton"
    path.write_bytes(content[:kept])
    with pytest.raises(ValueError, match=rf"{path}.*(half-written or cut off|isn't a .beton)"):
        open_beton(path)


def test_a_file_without_its_last_header_is_refused(betons, tmp_path):
    content = bytearray((betons / "val.beton").read_bytes())
    content[16:24] = bytes(8)  # alloc_table_ptr, which FFCV writes last
    path = tmp_path / "val.beton"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="half-written"):
        open_beton(path)


def test_missing_files_are_named(make_data, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no FFCV file at {tmp_path}/val.beton"):
        make_data("ffcv", root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="data.root=nowhere: no such folder"):
        make_data("ffcv", root="nowhere")
    with pytest.raises(ValueError, match="data.root isn't set"):
        make_data("ffcv", root=None)


def test_label_out_of_range_is_named(tree, tmp_path):
    whole = read_tree(tree / "val")
    path = tmp_path / "val.beton"
    with pytest.raises(WriteError, match="image 10 has label 2, out of the range 0 to 1"):
        write_beton(ImageTree(whole.root, whole.classes[:2], whole.files, whole.targets), path, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_wrong_number_of_classes_is_named(make_data):
    with pytest.raises(ValueError, match="data.num_classes=1000, but .*val.beton has 3 classes"):
        make_data("ffcv", num_classes=1000)


def test_differing_classes_are_refused(make_data, tree, tmp_path):
    for split, names in (("train", ("a", "b", "c")), ("val", ("a", "b", "d"))):
        part = read_tree(tree / split)
        write_beton(ImageTree(part.root, names, part.files, part.targets), tmp_path / f"{split}.beton", SMALL)
    with pytest.raises(ValueError, match="classes differ: .*train.beton has 3, .*val.beton has 3"):
        make_data("ffcv", root=str(tmp_path))


def test_writing_is_the_same_for_any_number_of_workers(tree, tmp_path):
    part = read_tree(tree / "train")
    files = []
    for workers in (1, 2):
        path = tmp_path / f"{workers}.beton"
        write_beton(part, path, Preset(36, jpeg=0.5, page_size=1 << 21), workers)
        files.append(open_beton(path))
    modes = [_read_tables(file.path)[1]["f0"]["mode"] for file in files]
    assert np.array_equal(*modes) and 0 < modes[0].mean() < 1
    assert np.array_equal(files[0].labels, files[1].labels) and np.array_equal(files[0].labels, part.targets)


def test_estimate_covers_the_file(betons, tree):
    estimate = estimate_bytes(StoredImages(read_tree(tree / "train"), SMALL))
    size = (betons / "train.beton").stat().st_size
    assert size <= estimate < 3 * size


def test_too_little_space_is_found_before_writing(tree, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(ffcv_writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(WriteError, match=r"train.beton needs about 0.\d\d GB, but .* has 0.00 GB free"):
        write_beton(read_tree(tree / "train"), tmp_path / "train.beton", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_leaves_no_file(tree, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(WriteError, match="can't write .*train.beton"):
            write_beton(read_tree(tree / "train"), tmp_path / "train.beton", SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_image_ends_the_writing_with_its_name(tree, tmp_path, monkeypatch):
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    bad = sorted((root / "train").rglob("*.JPEG"))[20]
    bad.write_bytes(bad.read_bytes()[:200])
    monkeypatch.setattr(ffcv_writer, "estimate_bytes", lambda images: 0)
    with pytest.raises(WriteError, match=f"can't read image {bad}"):
        write_beton(read_tree(root / "train"), tmp_path / "train.beton", SMALL, num_workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_an_existing_file_is_kept(betons, tree):
    with pytest.raises(FileExistsError, match="val.beton exists"):
        write_beton(read_tree(tree / "val"), betons / "val.beton", SMALL)


@pytest.mark.parametrize("options", [{"short_side": 0}, {"jpeg": 1.5}, {"quality": 0}])
def test_wrong_preset_values_are_named(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value} must lie between"):
        Preset(**{"short_side": 256, "jpeg": 0.5, **options})


def test_without_ffcv_one_message_says_what_to_install(make_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(ImportError, match=r"data=ffcv needs FFCV.*pip install 'convfirst\[ffcv\]'"):
        make_data("ffcv", root="anywhere")
