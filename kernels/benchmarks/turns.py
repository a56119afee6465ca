"""Suites that several processes run at once: all compile side by side, then each times with the GPU to itself.

A compilation takes some 10 s of one core, a measurement milliseconds of the GPU. A measurement is a generator that
yields None when it is compiled and captured, and its rows after that.
"""

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


def measured(jobs: Iterable[Iterator[dict | None]], turn: str | None) -> Iterator[dict]:
    """The rows of measurements.

    Args:
        jobs: the measurements, made one after another. Without a turn each is forgotten before the next begins.
        turn: a file that the processes share, or None. Each holds it with others while it prepares all of its
            measurements, and alone while it times them: nothing is timed before all who hold it have prepared theirs.
            A command that must not run beside a measurement can hold it too: `flock --shared FILE COMMAND`.
    """
    if turn is None:
        for job in jobs:
            next(job)
            yield from job
            torch.compiler.reset()
        return
    with _turn(turn) as take, _compiled_programs_kept():
        prepared = []
        for job in jobs:
            next(job)
            prepared.append(job)
        take()
        for job in prepared:
            yield from job


@contextmanager
def _turn(path: str):
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)

        def take() -> None:
            fcntl.flock(file, fcntl.LOCK_UN)  # two that both upgrade would wait for each other
            fcntl.flock(file, fcntl.LOCK_EX)

        yield take


@contextmanager
def _compiled_programs_kept():
    """Graphs need the programs that they were captured from: nothing may be dropped to make room in a code cache."""
    with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
        yield
    torch.compiler.reset()
