"""Options and summary of the kernel tests: ``pytest kernels/tests -m gpu -q --tb=no [--kernel-path sm80]``."""

import os
import time

import pytest
import torch

SEED = int(os.environ.get("CONVFIRST_SEED", time.time_ns() % 1_000_000))


def pytest_addoption(parser):
    parser.addoption("--kernel-path", default="", help="run GPU tests on this path or variant only: sm80, sm90, a name")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device of compute capability 8.0 or newer")


def pytest_report_header(config):
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"convfirst_kernels on {device}, torch {torch.__version__}; CONVFIRST_SEED={SEED} repeats this run"


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    """One line for each failure, last."""
    failed = terminalreporter.stats.get("failed", []) + terminalreporter.stats.get("error", [])
    if not failed:
        return
    terminalreporter.section(f"{len(failed)} failures, CONVFIRST_SEED={SEED}")
    for report in failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = (crash.message if crash else str(report.longrepr)).strip().splitlines()
        name = report.nodeid.split("::", 1)[-1]
        terminalreporter.write_line(f"{name}: {message[0][:160] if message else ''}")


@pytest.fixture
def seed(request) -> int:
    """Differs from run to run and from test to test; the header says how to repeat a run."""
    return SEED + sum(map(ord, request.node.nodeid))
