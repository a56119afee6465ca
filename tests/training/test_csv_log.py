"""The CSV log: what it says when its disk is full."""

import errno
import os

import pytest

from convfirst.training import CSVLog


def fail(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("fails", "metrics"),
    [
        pytest.param("csv.DictWriter.writerow", {"a": 2}, id="appended"),
        pytest.param("os.fsync", {"a": 2, "new": 3}, id="rewritten"),
    ],
)
def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch, fails, metrics):
    path = tmp_path / "metrics.csv"
    log = CSVLog(path)
    log.log_metrics({"a": 1}, 1)
    monkeypatch.setattr(fails, fail)
    with pytest.raises(OSError, match=f"can't write {path}: .*No space left"):
        log.log_metrics(metrics, 2)
    assert path.read_text().split() == ["step,epoch,a", "1,,1"]
    assert list(tmp_path.iterdir()) == [path]
