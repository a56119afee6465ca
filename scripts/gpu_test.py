"""Run the tests marked gpu and record the outcome in results/gpu-tests.json: python scripts/gpu_test.py [path ...].

The file names what was tested: the git tree of kernels/ and the commit. Where the repository's history is missing, the
environment variables KERNELS_TREE and GIT_COMMIT tell them.
"""

import sys
from pathlib import Path

import pytest
import torch

from convfirst.app.results import REPOSITORY, environment, git_object, write_json

RESULTS = Path(REPOSITORY / "results/gpu-tests.json")


class Tally:
    """Counts tests by outcome; a test that fails in setup or teardown, or can't be collected, has failed.

    It writes the result as soon as the last test has ended: a run that is stopped while it prints has its file.
    """

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        decides = report.when == "call" or not report.passed
        if decides and self.outcomes.get(report.nodeid) != "failed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self.outcomes[report.nodeid] = report.outcome

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        tree = git_object("HEAD:kernels", variable="KERNELS_TREE")
        write_json(RESULTS, {"kernels_tree": tree, **self.counts(), **environment()})

    def counts(self) -> dict[str, int]:
        outcomes = list(self.outcomes.values())
        return {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")}


def main(paths: list[str]) -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: the tests marked gpu need one", file=sys.stderr)
        return 1
    tally = Tally()
    default = [path for path in ("tests", "kernels/tests") if (REPOSITORY / path).is_dir()]
    options = ["-m", "gpu", "-c", str(REPOSITORY / "pyproject.toml"), "--rootdir", str(REPOSITORY)]
    code = pytest.main([*options, *(paths or default)], plugins=[tally])
    print(f"wrote {RESULTS}: {tally.counts()}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
