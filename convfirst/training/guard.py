"""What can end a run early: a signal, or a loss that is no number. All processes learn of it at the same step."""

import signal
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # a scheduler's warning; a person sends SIGINT or SIGTERM
_MORE_URGENT = 64  # more than any of our signals' numbers


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite."""


class StopRequested(Exception):
    """A signal asked the run to stop; the checkpoint `path` holds everything up to this moment.

    `path` is None where nothing was left to save: before the first update, or after the last.
    """

    def __init__(self, signum: int, path: str | None = None) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}, saved {path}")
        self.signum, self.path = signum, path


@dataclass
class _Pending:
    flags: torch.Tensor  # [urgency of a signal or 0, 1 if the loss isn't finite else 0]
    work: dist.Work | None
    where: str
    host: torch.Tensor  # `flags` on the CPU, once `copied`
    copied: torch.cuda.Event | None = None


class StepGuard:
    """Watches for signals and for a non-finite loss without making the device wait.

    A signal handler only sets a flag; of several signals one of `REQUEUE_SIGNALS` counts. Each step's flags are reduced
    over the processes (maximum) and, on a GPU, read one step later, when the device is done with them; `settle` reads
    them at once, which must come before a save.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._pending: _Pending | None = None
        self._handlers: dict[int, object] = {}
        self._stream: torch.cuda.Stream | None = None

    def install(self, signals: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, *REQUEUE_SIGNALS)) -> None:
        """Take over `signals`. A second SIGINT or SIGTERM acts as it did before; a scheduler may repeat the others."""
        for signum in signals:
            self._handlers[signum] = signal.signal(signum, self._request)

    def restore(self) -> None:
        """Give the signals back to their former handlers."""
        while self._handlers:
            signum, handler = self._handlers.popitem()
            signal.signal(signum, handler)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.signum = more_urgent(signum, self.signum)
        if signum not in REQUEUE_SIGNALS:
            signal.signal(signum, self._handlers.pop(signum))

    def observe(self, loss: torch.Tensor, where: str) -> int:
        """Hand over a step's loss (scalar) and the text `where` it was; returns the signal agreed on so far, or 0.

        Raises:
            NonFiniteLossError: an earlier loss (on a CPU: this one) isn't finite on some process.
        """
        pending = self._reduce(loss, where)
        signum = self._read() if loss.is_cuda else 0
        self._pending = pending
        return signum if loss.is_cuda else self._read()

    def _reduce(self, loss: torch.Tensor, where: str) -> _Pending:
        flags = torch.empty(2, device=loss.device, dtype=torch.float32)
        flags[0].fill_(float(_urgency(self.signum)))
        flags[1].copy_(~torch.isfinite(loss.detach()))
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True) if distributed else None
        if not flags.is_cuda:
            return _Pending(flags, work, where, host=flags)
        # on a stream of its own: a copy on the steps' stream would come after the step that is enqueued by then
        if self._stream is None:
            self._stream = torch.cuda.Stream(flags.device)
        self._stream.wait_stream(torch.cuda.current_stream(flags.device))
        with torch.cuda.stream(self._stream):
            if work is not None:
                work.wait()
            host = torch.empty(2, pin_memory=True).copy_(flags, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return _Pending(flags, work, where, host, copied)

    def agree(self, device: torch.device) -> int:
        """The signal that any process has received by now, or 0; every process must call it."""
        self._pending = self._reduce(torch.zeros((), device=device), "")
        return self._read()

    def settle(self) -> int:
        """Read what is still pending, as `observe` does."""
        return self._read()

    def _read(self) -> int:
        pending, self._pending = self._pending, None
        if pending is None:
            return 0
        if pending.copied is not None:
            pending.copied.synchronize()
        elif pending.work is not None:
            pending.work.wait()
        urgency, bad = pending.host.tolist()
        if bad:
            raise NonFiniteLossError(f"the loss isn't finite at {pending.where}")
        return int(urgency) % _MORE_URGENT


def _urgency(signum: int) -> int:
    return signum + _MORE_URGENT if signum in REQUEUE_SIGNALS else signum


def more_urgent(a: int, b: int) -> int:
    """The one of two signals (0: none) that decides what happens to the run."""
    return max(a, b, key=_urgency)
