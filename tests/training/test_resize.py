import logging

import pytest

from convfirst.app.train import train
from convfirst.training import ProgressiveResize
from tests.training.helpers import tiny_config


@pytest.mark.parametrize(
    "image_size, epochs, expected",
    [
        (192, 88, (160, 192, 65, 76)),  # ffcv-imagenet's own
        (224, 300, (192, 224, 222, 259)),
        (32, 3, (32, 32, 2, 2)),
    ],
)
def test_sizes_and_epochs_follow_the_run(image_size, epochs, expected):
    resize = ProgressiveResize()
    resize.derive(image_size, epochs)
    assert (resize.min_size, resize.max_size, resize.start_epoch, resize.end_epoch) == expected
    assert resize.size(0) == expected[0]
    assert resize.size(epochs - 1) == expected[1]


def test_what_is_given_stays():
    resize = ProgressiveResize(min_size=64, end_epoch=20)
    resize.derive(128, 88)
    assert (resize.min_size, resize.max_size, resize.end_epoch) == (64, 128, 20)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_size": 100}, "min_size=100 and max_size=224 must be rising multiples of multiple=32"),
        ({"max_size": 128, "min_size": 160}, "min_size=160 and max_size=128"),
        ({"start_epoch": 80}, "start_epoch=80 must not lie after end_epoch=76"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(options, message):
    options = {"end_epoch": 76, **options}
    with pytest.raises(ValueError, match=message):
        ProgressiveResize(**options).derive(224, 88)


def test_a_run_says_its_sizes_and_what_compiling_them_means(tmp_path, caplog):
    options = ("callbacks=progressive_resize", "callbacks.resize.multiple=8", "data.image_size=24", "epochs=2")
    with caplog.at_level(logging.INFO):
        train(tiny_config(tmp_path, *options, "trainer.limit_train_batches=2"))
    (message,) = [record.message for record in caplog.records if "growing" in record.message]
    assert message.startswith("images of 16, 24 pixels, growing in epochs 1 to 1")
    assert "compiled" not in message
