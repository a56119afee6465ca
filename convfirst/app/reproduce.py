"""One command a paper: measure, train if asked, and report the paper's figures beside ours."""

import importlib.util
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import hydra
import torch
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue

from convfirst.app import benchmark as benchmarks
from convfirst.app.measure_device import measure_device
from convfirst.app.papers import Findings, convfirst, maxdnn, winograd
from convfirst.app.papers.findings import read_paper
from convfirst.app.report import table, write_report
from convfirst.app.results import REPOSITORY, environment, gpu_slug

log = logging.getLogger(__name__)

# A paper's module says which suites to run (`suites`) and writes the report's sections (`sections`).
PAPERS: Mapping[str, ModuleType] = {"convfirst": convfirst, "winograd": winograd, "maxdnn": maxdnn}
_NEED_KERNELS = ("blocks", "models", "winograd", "direct")


def reproduce(config: DictConfig) -> Path:
    """Do what `configs/reproduce.yaml` describes; return the report, whose HTML stands beside it.

    Raises:
        ValueError: an option is unknown or can't be honoured, or a training failed.
        ModuleNotFoundError: what the report is rendered with isn't installed (extra `analysis`).
        FileNotFoundError: ``train=true``, but ``data.root`` is no folder.
    """
    paper = _check(config)
    slug = gpu_slug() if torch.cuda.is_available() else None
    results = REPOSITORY / config.results
    own = results / "quick" if config.quick else results
    skipped = _measure(config, PAPERS[paper], slug, own)
    if config.train:
        _train(config)
    findings = Findings(
        folders=(own, results) if config.quick else (results,),
        figures=own,
        reports=REPOSITORY / config.reports,
        runs={recipe: REPOSITORY / config.run_root / recipe for recipe in config.recipes},
        slug=slug,
        suffix="-quick" if config.quick else "",
    )
    header = _header(read_paper(paper), config, skipped)
    path = write_report([*header, *PAPERS[paper].sections(findings)], findings.reports, paper + findings.suffix)
    log.info("wrote %s and %s", path, path.with_suffix(".html"))
    return path


def _check(config: DictConfig) -> str:
    try:
        paper = config.paper
    except MissingMandatoryValue as error:
        raise ValueError(f"give paper=...; accepted: {', '.join(PAPERS)}") from error
    if paper not in PAPERS:
        raise ValueError(f"paper={paper!r} is unknown; accepted: {', '.join(PAPERS)}")
    if config.measure not in ("auto", "off"):
        raise ValueError(f"measure={config.measure!r} is unknown; accepted: auto, off")
    for package in ("markdown_it", "plotly"):  # before hours of measuring
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"the report needs {package}: pip install -e '.[analysis]'")
    if config.train and paper != "convfirst":
        raise ValueError(f"train=true, but paper={paper} trains nothing; accepted with paper=convfirst")
    if config.train:
        if config.data.root is None:
            raise ValueError("train=true needs ImageNet: give data.root=FOLDER")
        if not Path(config.data.root).is_dir():
            raise FileNotFoundError(f"data.root={config.data.root}: no such folder")
    return paper


def _measure(config: DictConfig, paper: ModuleType, slug: str | None, folder: Path) -> dict[str, str]:
    """Run the paper's suites; return those that were not measured, each with the reason."""
    wanted = paper.suites(folder, slug or "gpu", config.quick)
    names = list(dict.fromkeys(_suite(overrides) for overrides in wanted))
    if slug is None or config.measure == "off":
        why = "measure=off" if config.measure == "off" else "there is no CUDA device here"
        return dict.fromkeys(["device", *names], why)
    measure_device(hydra.compose("measure_device", overrides=[f"output={folder / f'device-{slug}.json'}"]))
    skipped = {}
    for name in names:
        if name not in benchmarks.SUITES:
            skipped[name] = "scripts/benchmark.py has no such suite yet"
        elif name in _NEED_KERNELS and importlib.util.find_spec("convfirst_kernels") is None:
            skipped[name] = "the package convfirst_kernels isn't installed (pip install ./kernels)"
    for overrides in wanted:
        if _suite(overrides) not in skipped:
            benchmarks.benchmark(hydra.compose("benchmark", overrides=overrides))
    return skipped


def _suite(overrides: list[str]) -> str:
    return overrides[0].removeprefix("suite=")


def _train(config: DictConfig) -> None:
    """Train each recipe by train.py, in a process that Lightning can start again on every device."""
    for recipe in config.recipes:
        arguments = [f"recipe={recipe}", f"data.root={config.data.root}", f"run_root={REPOSITORY / config.run_root}"]
        command = [sys.executable, str(REPOSITORY / "train.py"), *arguments, *config.train_overrides]
        log.info("training: %s", " ".join(command))
        status = subprocess.run(command, check=False).returncode
        if status:
            raise ValueError(
                f"train.py recipe={recipe} ended with status {status}; the same command goes on from there"
            )


def _header(paper: dict, config: DictConfig, skipped: dict[str, str]) -> list[str]:
    here = environment()
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    command = f"python scripts/reproduce.py paper={config.paper}"
    command += "".join(f" {option}=true" for option in ("quick", "train") if config[option])
    reasons: dict[str, list[str]] = {}
    for name, why in skipped.items():
        reasons.setdefault(why, []).append(name)
    rows = [
        ("made by", f"`{command}`"),
        ("on", here["device"]),
        ("date", here["date"]),
        ("commit", here["commit"]),
        ("versions", versions),
        ("not measured in this run", "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items()) or "–"),
    ]
    return [
        f"# {paper['title']}",
        f"A reproduction of [arXiv {paper['arxiv']}](https://arxiv.org/abs/{paper['arxiv']}). Values of the paper are "
        "marked *seen* in the source named, *derived* from such values by arithmetic, or *recalled, unverified*; its "
        "full text was not at hand. Measurements name the file, device and date that they come from.",
        table(("", ""), rows),
    ]
