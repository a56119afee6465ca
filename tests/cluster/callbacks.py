"""What happens to a run in a test: it is slowed down, so that a signal finds it, or a worker of torchrun is killed."""

import os
import signal
import time

from lightning import Callback


class Slow(Callback):
    """Waits after each update."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        time.sleep(self.seconds)


class KilledOnce(Callback):
    """kill -9 of the process of `rank` after update `step`, at torchrun's first attempt."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and trainer.global_rank == self.rank and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
