"""Metrics as a CSV file that survives a killed run."""

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from convfirst.training.checkpoint import write_atomically


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a metrics file; a last line cut off by a kill is left out. No file, no rows."""
    path = Path(path)
    if not path.exists():
        return []
    text = path.read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return list(csv.DictReader(lines))


class CSVLog(Logger):
    """Appends a row each time metrics are logged, and rewrites the file when a new column comes up.

    Rows beyond `start_step`, which a killed run left behind and the resumed one writes again, are dropped.
    Lightning's CSVLogger deletes the earlier rows on a restart.

    Args:
        path: the file.
        start_step: number of updates at which this process starts.

    Raises:
        OSError: while logging, the file can't be written, on a full disk for instance; the message names it.
    """

    def __init__(self, path: str | Path, start_step: int = 0) -> None:
        super().__init__()
        self.path = Path(path)
        self._rows: list[dict[str, Any]] = []
        self._columns = ["step", "epoch"]
        self._ready = False
        self._start_step = start_step

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        if not self._ready:
            self._rows = [old for old in read_rows(self.path) if int(old["step"]) <= self._start_step]
            self._columns += [key for old in self._rows[:1] for key in old if key not in self._columns]
        new = [key for key in row if key not in self._columns]
        self._columns += new
        self._rows.append(row)
        if new or not self._ready:
            self._rewrite()
        else:
            self._append(row)
        self._ready = True

    def _append(self, row: dict[str, Any]) -> None:
        try:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        except OSError as error:  # a full disk's names no file
            raise OSError(f"can't write {self.path}: {error}") from error

    def _rewrite(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomically(self.path, lambda file: file.write(text.getvalue().encode()))
