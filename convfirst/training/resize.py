"""Progressive resizing: small images first."""

from lightning import Callback, LightningModule, Trainer


class ProgressiveResize(Callback):
    """Train with images that grow from `min_size` to `max_size`, linearly from `start_epoch` to `end_epoch`.

    The size is constant within an epoch and a multiple of `multiple`, so that shapes stay static and few
    (ffcv-imagenet, train_imagenet.py at 4dd291a, `get_resolution`).

    Raises:
        ValueError: sizes or epochs are out of order, or no multiple of `multiple`.
    """

    def __init__(self, min_size: int, max_size: int, start_epoch: int, end_epoch: int, multiple: int = 32) -> None:
        if not 0 < min_size <= max_size or min_size % multiple or max_size % multiple:
            raise ValueError(
                f"resize: min_size={min_size} and max_size={max_size} must be rising multiples of multiple={multiple}"
            )
        if not 0 <= start_epoch <= end_epoch:
            raise ValueError(f"resize: start_epoch={start_epoch} must not lie after end_epoch={end_epoch}")
        self.min_size, self.max_size = min_size, max_size
        self.start_epoch, self.end_epoch, self.multiple = start_epoch, end_epoch, multiple

    def size(self, epoch: int) -> int:
        """Side in pixels in `epoch` (from 0)."""
        if epoch <= self.start_epoch:
            return self.min_size
        if epoch >= self.end_epoch:
            return self.max_size
        share = (epoch - self.start_epoch) / (self.end_epoch - self.start_epoch)
        size = self.min_size + share * (self.max_size - self.min_size)
        return round(size / self.multiple) * self.multiple

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.datamodule.set_image_size(self.size(trainer.current_epoch))  # a resumed epoch has no epoch start

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.datamodule.set_image_size(self.size(trainer.current_epoch))
