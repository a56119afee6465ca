"""Learning rate schedules: timm's, stepped once an update."""

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler


def create_scheduler(
    optimizer: torch.optim.Optimizer,
    epochs: int,
    steps_per_epoch: int,
    sched: str = "cosine",
    warmup_epochs: float = 0,
    warmup_lr: float = 0.0,
    warmup_reaches_peak: bool = False,
    **kwargs,
) -> Scheduler:
    """timm's scheduler `sched` over `epochs` epochs, of which the first `warmup_epochs` rise linearly from `warmup_lr`.

    Call ``scheduler.step_update(n)`` before update n (from 0): the rate is a function of n alone.

    Args:
        warmup_reaches_peak: the last warm-up update already has the peak rate, and so has the first update of the
            decay, as in ConvNeXt's `cosine_scheduler` (utils.py at 048efce, ``np.linspace``); timm's own warm-up ends
            one step below.
        kwargs: further arguments of `timm.scheduler.create_scheduler_v2`, e.g. ``min_lr``.

    Raises:
        ValueError: no epoch is left after the warm-up, `sched` counts its decay in epochs, or timm doesn't know it.
    """
    if sched in ("step", "multistep", "plateau"):
        raise ValueError(
            f"scheduler.sched={sched!r} decays by whole epochs; accepted are schedules by update: "
            "cosine, tanh, poly, constant"
        )
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(f"scheduler.warmup_epochs={warmup_epochs} must lie from 0 to below epochs={epochs}")
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=sched,
        num_epochs=epochs * steps_per_epoch - warmup_steps,  # counted in updates, which keeps fractions of epochs exact
        warmup_epochs=warmup_steps,
        warmup_lr=warmup_lr,
        warmup_prefix=True,
        step_on_epochs=False,
        updates_per_epoch=1,
        **kwargs,
    )
    if scheduler is None:
        raise ValueError(f"scheduler.sched={sched!r} gives no scheduler; use 'constant' for a constant learning rate")
    if warmup_reaches_peak and warmup_steps > 1:
        scheduler.warmup_steps = [(peak - warmup_lr) / (warmup_steps - 1) for peak in scheduler.base_values]
    return scheduler
