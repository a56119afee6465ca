"""Measured results as JSON: where and with what they were measured, and rows."""

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]
# Of an `environment`, what rows of one file share.
MEASURED_ALIKE = ("device", "commit", "versions")


def write_results(path: str | Path, suite: str, rows: list[dict], here: dict | None = None) -> Path:
    """Write ``{suite, device, date, commit, versions, rows}`` to ``path``; return the path.

    ``here`` is the `environment` in which the rows were measured, by default the present one.
    """
    write_json(Path(path), {"suite": suite, **(here or environment()), "rows": rows})
    return Path(path)


def kept_rows(path: str | Path, here: dict) -> list[dict]:
    """Rows of a result file to which others, measured in the environment ``here``, may be appended; [] without a file.

    Raises:
        ValueError: the file's rows were measured on another device, at another commit or with other versions.
    """
    if not Path(path).exists():
        return []
    before = json.loads(Path(path).read_text())
    for key in MEASURED_ALIKE:
        if before[key] != here[key]:
            raise ValueError(f"append=true, but {path} has {key}={before[key]} and this run {here[key]}")
    return before["rows"]


def write_json(path: Path, content: dict) -> None:
    """Write JSON that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def environment() -> dict:
    """Device name, date (UTC), commit and versions of what a measurement depends on."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    if torch.backends.cudnn.is_available():
        versions["cudnn"] = str(torch.backends.cudnn.version())
    for package in ("torch", "triton", "timm", "lightning", "ffcv", "convfirst-kernels"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": git_object("HEAD", variable="GIT_COMMIT"),
        "versions": versions,
    }


def device_name() -> str:
    """The GPU's marketing name, or the processor's."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()


def processor_name() -> str:
    """The processor's marketing name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_object(revision: str, variable: str) -> str:
    """Hash of a git revision; the environment's ``variable`` where set, "unknown" where there is no repository."""
    if os.environ.get(variable):
        return os.environ[variable]
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--verify", "--quiet", revision]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git itself is missing
        return "unknown"
    return found.stdout.strip() or "unknown"


def gpu_slug(name: str | None = None) -> str:
    """A GPU's short name, by default this machine's.

    >>> [gpu_slug(f"NVIDIA {name}") for name in ("H100 80GB HBM3", "A100-SXM4-80GB", "RTX A5000", "GeForce RTX 4090")]
    ['h100', 'a100', 'a5000', 'rtx-4090']
    """
    name = (torch.cuda.get_device_name() if name is None else name).lower()
    words = name.replace("nvidia", "").replace("geforce", "").split()
    if words[0] != "rtx":
        return words[0].partition("-")[0]
    return words[1] if words[1].startswith("a") else "-".join(words[:2])
