"""The effective batch: images behind one optimiser update, stated by the recipe and kept on any number of devices."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """How one update's images are spread: ``global_size = processes * per_device * accumulate``."""

    global_size: int
    processes: int
    per_device: int
    accumulate: int

    def steps_per_epoch(self, num_batches: int) -> int:
        """Updates in an epoch of `num_batches` batches a process.

        Batches beyond the last whole update are left to another epoch, as in ConvNeXt's code.

        Raises:
            ValueError: there is no whole update.
        """
        steps = num_batches // self.accumulate
        if steps == 0:
            raise ValueError(
                f"an update takes {self.accumulate} batches of {self.per_device} images on {self.processes} processes, "
                f"but an epoch holds {num_batches}; lower batch.global_size={self.global_size}"
            )
        return steps


def plan_batch(
    global_size: int, devices: int, nodes: int, per_device: int | None = None, accumulate: int | None = None
) -> BatchPlan:
    """Spread `global_size` images over devices * nodes processes and, where not given, derive the rest.

    With `accumulate` alone missing it is derived; with `per_device` alone missing that is; with both missing nothing is
    accumulated.

    Raises:
        ValueError: the product isn't the global batch, with the arithmetic.
    """
    given = {"batch.global_size": global_size, "data.batch_size": per_device, "batch.accumulate": accumulate}
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    processes = devices * nodes
    shown = f"batch.global_size={global_size}, {devices} devices x {nodes} nodes"
    if per_device is None:
        parts = processes * (accumulate or 1)
        if global_size % parts:
            raise ValueError(f"{shown} x accumulate {accumulate or 1}: {global_size} / {parts} isn't whole")
        per_device = global_size // parts
    if accumulate is None:
        images = processes * per_device
        if global_size % images:
            raise ValueError(
                f"{shown} x data.batch_size={per_device} = {images} images: "
                f"{global_size} isn't a multiple of {images}; change data.batch_size or trainer.devices"
            )
        accumulate = global_size // images
    product = processes * per_device * accumulate
    if product != global_size:
        raise ValueError(
            f"{shown} x data.batch_size={per_device} x batch.accumulate={accumulate} = {product}, not {global_size}; "
            f"leave batch.accumulate out to derive it, or set batch.global_size={product} if you mean another recipe"
        )
    return BatchPlan(global_size, processes, per_device, accumulate)
