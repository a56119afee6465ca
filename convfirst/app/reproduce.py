"""One command a paper: measure, train if asked, and report the paper's figures beside ours."""

import importlib.util
import itertools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from convfirst.app import benchmark as benchmarks
from convfirst.app.measure_device import measure_device
from convfirst.app.papers import Findings, convfirst, maxdnn, winograd
from convfirst.app.papers.findings import read_paper
from convfirst.app.report import table, write_report
from convfirst.app.results import MEASURED_ALIKE, REPOSITORY, environment, gpu_slug, write_json, write_results

log = logging.getLogger(__name__)

# A paper's module says which suites to run (`suites`) and writes the report's sections (`sections`).
PAPERS: Mapping[str, ModuleType] = {"convfirst": convfirst, "winograd": winograd, "maxdnn": maxdnn}
_NEED_KERNELS = ("blocks", "models", "winograd", "direct")
# Lists of a suite's options, outermost first: it is measured in parts of one value each, an interrupted one of which
# begins anew.
_PARTS = {
    "blocks": ("blocks.dtypes",),
    "models": ("networks.dtypes", "networks.batches"),
    "throughput": ("models", "throughput.modes", "throughput.batches"),
    "winograd": ("winograd.dtypes", "winograd.batches"),
    "direct": ("direct.dtypes",),
}


def reproduce(config: DictConfig) -> Path:
    """Do what `configs/reproduce.yaml` describes; return the report, whose HTML stands beside it.

    With ``train=true`` it is written before each training too. A run that is started again after its measurements were
    interrupted doesn't repeat those that it has made on the same device, at the same commit, with the same versions.

    Raises:
        ValueError: an option is unknown or can't be honoured, a suite gave no rows, or a training failed.
        PermissionError: the folder ``reports`` can't be made or written to.
        ModuleNotFoundError: what the report is rendered with isn't installed (extra `analysis`).
        FileNotFoundError: ``train=true``, but ``data.root`` is no folder; or ``results`` is none, and nothing is
            measured into it.
    """
    slug = gpu_slug() if torch.cuda.is_available() else None
    why_not = _why_not_measured(config, slug)
    paper = _check(config, why_not)
    results = REPOSITORY / config.results
    own = results / "quick" if config.quick else results
    suites = PAPERS[paper].suites(own, slug or "gpu", config.quick)
    skipped = _skipped(suites, why_not)
    if why_not is None:
        measure_device(hydra.compose("measure_device", overrides=[f"output={own / f'device-{slug}.json'}"]))
        _measure([overrides for overrides in suites if _suite(overrides) not in skipped])
    path = _report(config, slug, own, skipped)
    for recipe in config.recipes if config.train else []:
        _train(config, recipe)
        path = _report(config, slug, own, skipped)
    return path


def _report(config: DictConfig, slug: str | None, own: Path, skipped: dict[str, str]) -> Path:
    paper, results = config.paper, REPOSITORY / config.results
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


def _why_not_measured(config: DictConfig, slug: str | None) -> str | None:
    if config.measure == "off":
        return "measure=off"
    return "there is no CUDA device here" if slug is None else None


def _check(config: DictConfig, why_not: str | None) -> str:
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
    reports = REPOSITORY / config.reports
    reports.mkdir(parents=True, exist_ok=True)
    if not os.access(reports, os.W_OK):
        raise PermissionError(f"reports={config.reports}: this user may not write to that folder")
    if why_not is not None and not (REPOSITORY / config.results).is_dir():
        raise FileNotFoundError(f"results={config.results}: no such folder, and nothing is measured into it: {why_not}")
    known = GlobalHydra.instance().config_loader().get_group_options("recipe")
    for recipe in config.recipes:
        if recipe not in known:
            raise ValueError(f"recipes=[{recipe}] is unknown; accepted: {', '.join(known)}")
    if config.train and paper != "convfirst":
        raise ValueError(f"train=true, but paper={paper} trains nothing; accepted with paper=convfirst")
    if config.train:
        if config.data.root is None:
            raise ValueError("train=true needs ImageNet: give data.root=FOLDER")
        if not Path(config.data.root).is_dir():
            raise FileNotFoundError(f"data.root={config.data.root}: no such folder")
    return paper


def _skipped(suites: list[list[str]], why_not: str | None) -> dict[str, str]:
    """The suites that are not measured, each with the reason."""
    names = list(dict.fromkeys(_suite(overrides) for overrides in suites))
    if why_not is not None:
        return dict.fromkeys(["device", *names], why_not)
    skipped = {}
    for name in names:
        if name not in benchmarks.SUITES:
            skipped[name] = "scripts/benchmark.py has no such suite yet"
        elif name in _NEED_KERNELS and importlib.util.find_spec("convfirst_kernels") is None:
            skipped[name] = "the package convfirst_kernels isn't installed (pip install ./kernels)"
    return skipped


def _measure(suites: list[list[str]]) -> None:
    """Measure result files one after another, each of the suites that write to it."""
    here = environment()  # a commit made while a suite measures is not the one that it measures
    files: dict[Path, list[list[str]]] = {}
    for overrides in suites:
        files.setdefault(_output(overrides), []).extend(_parts(overrides))
    for output, parts in files.items():
        _measure_file(output, parts, here)
    for output in files:
        _unfinished(output).unlink(missing_ok=True)


def _measure_file(output: Path, parts: list[list[str]], here: dict) -> None:
    """Measure the parts that an earlier run hasn't, and replace ``output`` when all are there."""
    suite, keys = _suite(parts[0]), [" ".join(part) for part in parts]
    began = _taken_up(_unfinished(output), {"suite": suite, **here, "parts": {}})
    measured = began["parts"]
    for key, part in zip(keys, parts, strict=True):
        if key in measured:
            continue
        config = hydra.compose("benchmark", overrides=part)
        measured[key] = list(benchmarks.SUITES[suite](config))
        write_json(_unfinished(output), began)
    rows = [row for key in keys for row in measured[key]]
    if not rows:
        raise ValueError(f"suite={suite} gave no rows; {output} stays as it is")
    benchmarks.print_rows(suite, rows)
    log.info("wrote %s", write_results(output, suite, rows, {key: began[key] for key in here}))


def _taken_up(unfinished: Path, fresh: dict) -> dict:
    """What an interrupted run has noted in the same circumstances as ``fresh``; else that."""
    if not unfinished.exists():
        return fresh
    before = json.loads(unfinished.read_text())
    for key in MEASURED_ALIKE:
        if before[key] != fresh[key] or fresh[key] == "unknown":
            log.warning("%s has %s=%s, this run %s: measuring anew", unfinished, key, before[key], fresh[key])
            return fresh
    log.info("going on from %s", unfinished)
    return before


def _unfinished(output: Path) -> Path:
    """Where a result file's rows are kept until all are measured: the folder `unfinished` beside it."""
    return output.parent / "unfinished" / output.name


def _parts(overrides: list[str]) -> list[list[str]]:
    """Overrides of a suite's parts, which give its rows together."""
    config = hydra.compose("benchmark", overrides=overrides)
    lists = [[f"{key}=[{value}]" for value in OmegaConf.select(config, key)] for key in _PARTS.get(config.suite, ())]
    return [[*overrides, *values] for values in itertools.product(*lists)]


def _suite(overrides: list[str]) -> str:
    return overrides[0].removeprefix("suite=")


def _output(overrides: list[str]) -> Path:
    return Path(overrides[1].removeprefix("output="))


def _train(config: DictConfig, recipe: str) -> None:
    """Train a recipe by train.py, in a process that Lightning can start again on every device."""
    arguments = [f"recipe={recipe}", f"data.root={config.data.root}", f"run_root={REPOSITORY / config.run_root}"]
    command = [sys.executable, str(REPOSITORY / "train.py"), *arguments, *config.train_overrides]
    log.info("training: %s", " ".join(command))
    status = subprocess.run(command, check=False).returncode
    if status:
        raise ValueError(
            f"train.py recipe={recipe} ended with status {status}; the report is written without it. "
            "The same command with measure=off goes on from there"
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
