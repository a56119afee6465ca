"""What a report is made from: result files, training runs, and the papers' own values."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import convfirst.models  # noqa: F401  registers ConvFirst with timm
from convfirst.analysis.devices import Device, device_names, load_device
from convfirst.analysis.trace import Trace, meta_model, trace
from convfirst.app.report import table
from convfirst.app.results import gpu_slug

PAPERS = Path(__file__).parents[2] / "analysis/papers"
CERTAINTY = {"recalled": "recalled, unverified", "missing": "–"}


@dataclass(frozen=True)
class Findings:
    """Where to look and where to write.

    Attributes:
        folders: result folders, the first of which wins for a file of the same name.
        figures: folder of the pictures that a document shows, which are drawn anew there.
        reports: folder for the report, for web pages and for all other pictures.
        runs: run directory of each recipe.
        slug: short name of the GPU at hand, None without one.
        suffix: of the names of pages, so that a quick run's don't take the place of others.
    """

    folders: tuple[Path, ...]
    figures: Path
    reports: Path
    runs: Mapping[str, Path]
    slug: str | None
    suffix: str = ""

    def files(self, suite: str) -> list[Path]:
        """Result files ``<suite>-*.json`` and ``<suite>.json``, that of the GPU at hand first."""
        found: dict[str, Path] = {}
        for folder in self.folders:
            for path in sorted([*folder.glob(f"{suite}-*.json"), *folder.glob(f"{suite}.json")]):
                found.setdefault(path.name, path)
        return sorted(found.values(), key=lambda path: (path.stem != f"{suite}-{self.slug}", path.name))

    def results(self, suite: str) -> list[tuple[Path, dict]]:
        """Contents of the suite's own files, ``<suite>-<GPU>.json`` and ``<suite>.json``."""
        return [(path, results) for path, results in self._contents(suite) if _is_own(path, results, suite)]

    def side_results(self, suite: str) -> list[tuple[Path, dict, str]]:
        """Contents of the suite's other files, each with how it differs from the own file of that device."""
        own = {results["device"]: (path, results) for path, results in self.results(suite)}
        others = [(path, results) for path, results in self._contents(suite) if not _is_own(path, results, suite)]
        return [(path, results, _difference(results, *own.get(results["device"], ()))) for path, results in others]

    def _contents(self, suite: str) -> list[tuple[Path, dict]]:
        """Contents of `files`, less those of another suite whose name only begins the same."""
        contents = ((path, json.loads(path.read_text())) for path in self.files(suite))
        return [(path, results) for path, results in contents if results.get("suite", suite) == suite]

    def picture(self, name: str) -> Path:
        """Where to draw a picture: in its place among `figures` if it is one of them, else beside the report."""
        shown = self.figures / f"{name}.png"
        return shown if shown.exists() else self.reports / f"{name}{self.suffix}.png"

    def knows(self, slug: str) -> bool:
        """Whether a device's ceilings are shipped or measured."""
        return slug in device_names() or any((folder / f"device-{slug}.json").exists() for folder in self.folders)

    def device(self, slug: str) -> Device:
        """Ceilings of a device, those of its ``device-<slug>.json`` first."""
        folders = [folder for folder in self.folders if (folder / f"device-{slug}.json").exists()]
        return load_device(slug, folders[0] if folders else None)


_DIFFERENCES = ("dtype", "algorithm", "path", "variant")  # columns that tell one kind of run from another
_CELL = ("name", "layer", "batch", "N", "dtype", "direction")  # columns that tell what was measured


def _cell(row: Mapping) -> tuple:
    return tuple(row.get(column) for column in _CELL)


def _is_own(path: Path, results: Mapping, suite: str) -> bool:
    return path.stem in (suite, f"{suite}-{gpu_slug(results['device'])}")


def _difference(side: Mapping, path: Path | None = None, own: Mapping | None = None) -> str:
    """What of a side file isn't in the suite's own file, in rows that measure the same: "path sm80 instead of sm90"."""
    if own is None:
        return "the suite's own file of this device isn't there"
    both = {_cell(row) for row in side["rows"]} & {_cell(row) for row in own["rows"]}
    parts = []
    for column in _DIFFERENCES:
        if column == "variant" and parts:  # many names, that say no more
            break
        new, old = (
            {row[column] for row in results["rows"] if row.get(column) and (column == "dtype" or _cell(row) in both)}
            for results in (side, own)
        )
        if new - old:
            instead = f" instead of {', '.join(sorted(old - new))}" if old - new else ""
            parts.append(f"{column} {', '.join(sorted(new - old))}{instead}")
    return f"{'; '.join(parts) or 'measured apart'}, beside `{path.name}`"


def measured_tables(findings: Findings, suite: str, as_table: Callable[[dict], str]) -> list[str]:
    """A suite's own files as tables, then its side files under what they differ in; each with its provenance."""
    parts = []
    for path, results in findings.results(suite):
        parts += [as_table(results), provenance(path, results)]
    parts = parts or ["Not measured."]
    for path, results, difference in findings.side_results(suite):
        parts += [f"### `{path.name}`: {difference}", as_table(results), provenance(path, results)]
    return parts


def provenance(path: Path, results: dict) -> str:
    """One line that says where, when and with what a result file was measured."""
    quick = " (quick)" if path.parent.name == "quick" else ""
    commit, torch_version = results["commit"][:10], results["versions"]["torch"]
    return f"`{path.name}`{quick}: {results['device']}, {results['date']}, commit {commit}, PyTorch {torch_version}."


def read_paper(name: str) -> dict:
    return json.loads((PAPERS / f"{name}.json").read_text())


def claims(paper: dict, ours: Mapping[str, str]) -> str:
    """The paper's claims with source and certainty, beside ours by the claims' ids."""
    rows = [
        (
            claim["fact"],
            claim["value"],
            CERTAINTY.get(claim["certainty"], claim["certainty"]),
            claim["source"] or "–",
            ours.get(claim.get("id"), "–"),
        )
        for claim in paper["claims"]
    ]
    return table(("", "paper", "certainty", "source", "here"), rows)


@cache
def traced(model: str, batch: int, image_size: int) -> Trace:
    """Trace of a model of timm's registry in float16."""
    return trace(meta_model(model), batch, image_size)
