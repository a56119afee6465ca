"""The papers' reports, rendered on a CPU from shipped and made-up results."""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from convfirst.analysis.convolutions import ConvLayer, WinogradTile, tile_quantisation
from convfirst.analysis.latency import read_accuracies
from convfirst.app import benchmark as benchmark_module
from convfirst.app import reproduce as reproduce_module
from convfirst.app.measure_device import measure_device
from convfirst.app.papers import convfirst as convfirst_paper
from convfirst.app.papers import winograd
from convfirst.app.reproduce import reproduce
from convfirst.app.results import write_json

REPOSITORY = Path(__file__).parents[2]
CONFIGS = str(REPOSITORY / "configs")
ABOUT = {
    "device": "NVIDIA H100 80GB HBM3",
    "date": "2026-01-02",
    "commit": "0123456789abcdef",
    "versions": {"torch": "2.14"},
}


@pytest.fixture(autouse=True)
def _hydra(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        yield


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Results of one day, in a copy, with three of the models whose accuracy is known."""
    (tmp_path / "results").mkdir()
    for name in ("models-h200.json", "blocks-h200.json"):
        shutil.copy(Path(__file__).parent / "results" / name, tmp_path / "results")
    few = [row for row in read_accuracies() if row.model in ("convfirst_tiny", "convnext_tiny", "resnet50")]
    monkeypatch.setattr(convfirst_paper, "read_accuracies", lambda: few)
    return [f"results={tmp_path / 'results'}", f"reports={tmp_path / 'reports'}", f"run_root={tmp_path / 'runs'}"]


@pytest.fixture
def without_pictures(monkeypatch):
    """Nothing is drawn, which takes longest; a picture's caption stands in its place."""
    for name in ("draw_waterline", "draw_efficiency_gap", "write_efficiency_gap_page"):
        monkeypatch.setattr(convfirst_paper, name, lambda *_: None)
    monkeypatch.setattr(convfirst_paper, "figure", lambda picture, folder, caption: caption)


def _winograd_row(layer: ConvLayer, algorithm: str, ms: float, dtype: str = "float32") -> dict:
    row = {"layer": f"conv{layer.name}", "N": 8, "dtype": dtype, "algorithm": algorithm, "ours_ms": ms, "peer_ms": 2.0}
    return {**row, "peer": "cudnn", "speedup": 2.0, "effective_tflops": 1.0, "max_error": 1e-5 * ms}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU in name, whose ceilings are not measured; the names of those that would be, as they are asked for."""
    ran = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA GeForce RTX 3090")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90000)
    monkeypatch.setattr(reproduce_module, "measure_device", lambda config: ran.append(("device", config.output)))
    return ran


@pytest.fixture
def measured(gpu, monkeypatch):
    """The parts that stand-ins for the suites have measured, two rows each; the report shows nothing of them.

    ``measured.fails_at = n`` stops the n-th part after its first row, once.
    """

    class Parts(list):
        fails_at = None

    parts = Parts()

    def stand_in(options):
        def suite(config):
            node = OmegaConf.select(config, options) if options else config
            names = config.models if config.suite == "throughput" else [node.get("select", "")]
            about = (config.suite, *names, *node.get("dtypes", []), *node.get("batches", []))
            parts.append(about)
            yield {"part": len(parts), "about": list(about), "row": 1}
            if parts.fails_at == len(parts):
                parts.fails_at = None
                raise ValueError("interrupted")
            yield {"part": len(parts), "about": list(about), "row": 2}

        return suite

    names = {"blocks": "blocks", "models": "networks", "winograd": "winograd", "direct": "direct", "throughput": None}
    monkeypatch.setattr(benchmark_module, "SUITES", {suite: stand_in(options) for suite, options in names.items()})
    monkeypatch.setattr(reproduce_module, "_NEED_KERNELS", ())
    for paper in reproduce_module.PAPERS.values():
        monkeypatch.setattr(paper, "sections", lambda findings: ["sections"])
    return parts


def rows(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def run(*overrides: str) -> str:
    return reproduce(hydra.compose("reproduce", overrides=list(overrides))).read_text()


def test_convfirst_without_a_gpu(folders, tmp_path):
    text = run("paper=convfirst", *folders)
    assert "device, blocks, models, throughput: there is no CUDA device here" in text
    assert (
        "| approximately 4x | seen | abstract, version 1 | 2.67x = 1.36 (less work) x 1.96 (efficiency): convfirst_"
        in text
    )
    assert "convfirst_tiny: not run; convnext_tiny: not run" in text
    assert "RTX A5000, fp16 | recalled, unverified" in text
    assert "`models-h200.json`: NVIDIA H200" in text and "`blocks-h200.json`: NVIDIA H200" in text
    assert "Not measured on this device, ideal only: resnet50." in text  # the H200's
    assert "Measured: results/models-h200.json (NVIDIA H200, 2026-11-22), whose rows name no image size and are" in text
    published = (
        "| convnext_tiny, torch.compile | 224 | 82.10 | not run | 4.46 | 53.9 | 149 | 95.4 | 0.361 | 1 | 1 | 1 |"
    )
    assert published in text
    assert re.search(r"\| convnext_tiny \| block fused \| 28 \|", text)
    for name in ("efficiency-gap-h200", "efficiency-gap-rtx-4090", "waterline-h200"):
        assert (tmp_path / f"reports/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"]({name}.png)" in text
    page = (tmp_path / "reports/efficiency-gap-rtx-4090.html").read_text()
    assert "Plotly.newPlot" in page and "152.872" not in page and "convnext_tiny" in page
    assert not re.search(r'<script[^>]+src="http', page)  # nothing from the network
    html = (tmp_path / "reports/convfirst.html").read_text()
    assert html.count('src="data:image/png;base64,') == 4 and "<table>" in html and "../results" not in html
    assert not list(tmp_path.rglob(".*"))  # nothing half-written


def test_devices_without_ceilings_are_named(folders, tmp_path, without_pictures):
    assert "neither shipped nor measured" not in run("paper=convfirst", *folders)
    (tmp_path / "results/models-l40s.json").write_text(json.dumps({**ABOUT, "device": "NVIDIA L40S", "rows": []}))
    text = run("paper=convfirst", *folders)
    assert "Left out here and below, as their ceilings are neither shipped nor measured: l40s (`python" in text


def test_speed_ups_are_over_convnext_under_inductor(folders, without_pictures):
    """The paper's comparison, at one batch: work and efficiency; the fused ConvNeXt is one row more."""
    text = run("paper=convfirst", *folders)
    assert "speed-up over convnext_tiny, Inductor | = less work | x efficiency |" in text
    claim = (
        "convfirst_tiny, fused, over convnext_tiny, Inductor: 2.67x = 1.36 (less work) x 1.96 (efficiency), batch 128."
    )
    assert claim in text
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in text.splitlines()}
    assert rows["convfirst_tiny, fused"][2:4] == ["–", "not run"]
    assert rows["convfirst_tiny, fused"][8:11] == ["0.305", "2.67", "1.36"]
    assert rows["convfirst_tiny, fused"][11] == "1.96"
    assert rows["convnext_tiny, Inductor"][9:12] == ["1", "1", "1"]
    assert rows["convnext_tiny, Inductor"][-1] == "inductor, batch 128 |"
    assert rows["convnext_tiny, fused"][9:12] == ["0.964", "1", "0.964"]
    assert rows["convfirst_tiny, Inductor"][10] == "1.36"


def test_pictures_that_a_document_shows_are_drawn_anew_and_no_others_beside_them(folders, tmp_path):
    (tmp_path / "results/winograd-h100-float32.png").write_bytes(b"old")
    rows = [_winograd_row(layer, "f2", 1.0, dtype) for layer in winograd.LAYERS for dtype in ("float32", "float16")]
    (tmp_path / "results/winograd-h100.json").write_text(json.dumps({**ABOUT, "rows": rows}))
    before = {path.name for path in (tmp_path / "results").iterdir()}
    text = run("paper=winograd", *folders)
    assert {path.name for path in (tmp_path / "results").iterdir()} == before
    assert (tmp_path / "results/winograd-h100-float32.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "reports/winograd-h100-float16.png").exists()
    assert "](../results/winograd-h100-float32.png)" in text and "](winograd-h100-float16.png)" in text


def test_accuracy_comes_from_the_summaries_of_imagenet_runs(folders, tmp_path, without_pictures):
    for recipe, images in (("convfirst_tiny", 50_000), ("convnext_tiny", 100)):
        (tmp_path / "runs" / recipe).mkdir(parents=True)
        summary = {
            "test": {"top1": 81.5, "top1_ema": 81.75},
            "test_images": images,
            "test_image_size": 224,
            "epochs": 300,
        }
        (tmp_path / "runs" / recipe / "summary.json").write_text(json.dumps(summary))
    text = run("paper=convfirst", *folders)
    assert "convfirst_tiny: 81.75 %; convnext_tiny: not run (the run tested 100 images" in text
    assert "| 81.75 | 224 | convfirst_tiny/summary.json, 300 epochs |" in text
    assert re.search(r"\| convfirst_tiny \| 3.27 \| – \| 81.75 \|", text)
    assert "| convfirst_tiny, fused | 224 | – | 81.75 |" in text
    assert "| convnext_tiny, Inductor | 224 | 82.10 | not run |" in text
    assert "| convfirst_tiny | – | 224 | none published:" in text


def test_own_runs_stand_beside_the_published_accuracy(folders, tmp_path, monkeypatch, without_pictures):
    drawn = []
    monkeypatch.setattr(convfirst_paper, "draw_efficiency_gap", lambda points, *_: drawn.extend(points))
    (tmp_path / "runs/convnext_tiny").mkdir(parents=True)
    summary = {"test": {"top1": 81.5}, "test_images": 50_000, "test_image_size": 224, "epochs": 300}
    (tmp_path / "runs/convnext_tiny/summary.json").write_text(json.dumps(summary))
    text = run("paper=convfirst", *folders)
    assert "| convnext_tiny, Inductor | 224 | 82.10 | 81.50 |" in text
    own = {(point.name, point.accuracy.top1, point.own and point.own.top1) for point in drawn}
    assert {("convnext_tiny, Inductor", 82.1, 81.5), ("convnext_tiny, fused", 82.1, 81.5)} <= own
    assert ("convfirst_tiny, fused", None, None) in own


def test_winograd_without_results(folders):
    text = run("paper=winograd", *folders)
    assert "| F(4x4,3x3) | 144 | 36 | 4 | 144 | 72 | 100 | wincnn FAQ |" in text
    assert "| total | 16 | – | – | 39.02 |" in text
    assert "| layer | direct float32 | F(2x2,3x3) float32 |" in text and "| 1.2 | 4.01e-05 | 1.53e-05 |" in text
    assert "| 1 | 12.5 | 3.12 | 5.55 | 7.03 | 2.26 |" in text and "recalled, unverified" in text
    assert text.count("not measured") >= 4


def test_results_of_a_suite_whose_name_begins_the_same_are_left_alone(folders, tmp_path):
    error = {**ABOUT, "suite": "winograd-error", "rows": [{"precision": "float32"}]}
    (tmp_path / "results/winograd-error.json").write_text(json.dumps(error))
    assert run("paper=winograd", *folders).count("not measured") >= 4


def test_winograd_results_are_picked_up_when_they_appear(folders, tmp_path):
    algorithms = (("f2", 1.0), ("f4", 3.0))
    rows = [_winograd_row(layer, algorithm, ms) for layer in winograd.LAYERS for algorithm, ms in algorithms]
    rows += [{**rows[0], "dtype": "float16"}]
    (tmp_path / "results/winograd-h100.json").write_text(json.dumps({**ABOUT, "rows": rows}))
    text = run("paper=winograd", *folders)
    # Sixteen layers at 1 ms against 2 ms; 39.02 GFLOP x 8
    assert "| 8 | 32 | 9.75 | 16 | 19.5 | 2 |" in text
    assert "layers 1.2, 2.1, 2.2, 3.1, 3.2, 4.1, 4.2, 5 not measured" in text
    assert "| layer | f4 float32 | f2 float32 |" in text and "| 5 | 3.00e-05 | 1.00e-05 |" in text
    assert "`winograd-h100.json`: NVIDIA H100 80GB HBM3, 2026-01-02, commit 0123456789, PyTorch 2.14." in text
    assert (tmp_path / "reports/winograd-h100-float32.png").exists()


def test_side_files_stand_behind_the_suites_own_and_say_how_they_differ(folders, tmp_path):
    rows = [_winograd_row(layer, "f2", 1.0, dtype) for layer in winograd.LAYERS for dtype in ("float32", "float16")]
    others = {"bfloat16": ("f2", "bfloat16"), "fused": ("f2-fused", "float16")}
    (tmp_path / "results/winograd-h100.json").write_text(json.dumps({**ABOUT, "rows": rows}))
    for name, (algorithm, dtype) in others.items():
        rows = [_winograd_row(layer, algorithm, 0.5, dtype) for layer in winograd.LAYERS]
        (tmp_path / f"results/winograd-{name}-h100.json").write_text(json.dumps({**ABOUT, "rows": rows}))
    text = run("paper=winograd", *folders)
    fused = "Here, `winograd-fused-h100.json` (algorithm f2-fused instead of f2, beside `winograd-h100.json`):"
    other = (
        "Here, `winograd-bfloat16-h100.json` (dtype bfloat16 instead of float16, float32, beside `winograd-h100.json`):"
    )
    speed, error = text.split("## Error by layer")
    for part in (speed, error):
        assert part.count(fused) == part.count(other) == 1
        assert part.index("\nHere:") < min(part.index(fused), part.index(other))
    assert speed.index("### float16") < speed.index(fused) < speed.index("### bfloat16") < speed.index(other)


def test_maxdnn_with_and_without_results(folders, tmp_path):
    text = run("paper=maxdnn", *folders)
    assert "| alexnet_conv2 | 64x27x27 | 192x5x5, stride 1 | 192x27x27 | 57.3 | 1 |" in text
    assert "| convnet_benchmarks_L1 | 3x128x128 | 96x11x11, stride 1 | 96x118x118 | 124 | 0.75 |" in text
    assert "96.3 %" in text and text.endswith("Not measured.\n")
    row = {"layer": "alexnet_conv2", "N": 128, "dtype": "float16", "ours_ms": 0.1, "efficiency": 0.9, "peer": "cudnn"}
    rows = [{**row, "peer_ms": 0.12, "speedup": 1.2}, {**row, "direction": "dgrad", "efficiency": 0.95}]
    (tmp_path / "results/direct-h100.json").write_text(json.dumps({**ABOUT, "rows": rows}))
    text = run("paper=maxdnn", *folders)
    assert "| alexnet_conv2 | forward | 128 | float16 | 0.1 | 0.9 | cudnn | 0.12 | 0.75 | 1.2 |" in text
    best = "| 96.3 %, forward pass | seen | abstract | 90.0%: alexnet_conv2, float16 (NVIDIA H100 80GB HBM3"
    assert f"{best}, direct-h100.json) |" in text
    side = [{**rows[0], "path": "sm90", "variant": "sm90_first", "efficiency": 0.97}]
    (tmp_path / "results/direct-first-h100.json").write_text(json.dumps({**ABOUT, "rows": side}))
    text = run("paper=maxdnn", *folders)
    assert f"{best}, direct-h100.json) |" in text  # no other
    assert "### `direct-first-h100.json`: path sm90, beside `direct-h100.json`" in text and "| 0.97 |" in text


def test_blocks_of_another_path_stand_under_a_title(folders, tmp_path, without_pictures):
    results = json.loads((tmp_path / "results/blocks-h200.json").read_text())
    rows = [{**row, "path": "sm75"} for row in results["rows"]]
    (tmp_path / "results/blocks-portable-h200.json").write_text(json.dumps({**results, "rows": rows}))
    text = run("paper=convfirst", *folders)
    title = re.search(r"### `blocks-portable-h200.json`: path sm75 instead of sm\d+.*, beside `blocks-h200.json`", text)
    assert text.index("`blocks-h200.json`: NVIDIA H200") < title.start()


def test_suites_run_on_a_gpu_and_what_is_missing_is_said(folders, tmp_path, monkeypatch, without_pictures, gpu):
    def throughput(config):
        gpu.append((config.suite, config.output))
        return [
            {"name": "resnet50", "batch": 128, "image_size": 224, "path": "eager+graph", "dtype": "float16", "ms": 1.0}
        ]

    monkeypatch.setattr(benchmark_module, "SUITES", {**benchmark_module.SUITES, "throughput": throughput})
    find = importlib.util.find_spec
    without_kernels = lambda name, *rest: None if name == "convfirst_kernels" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without_kernels)
    device = {**ABOUT, "device": "NVIDIA GeForce RTX 3090"}
    device["measured"] = {"bandwidth_tbps": 0.85, "tflops": {"float16": 70.0}, "source": "measured here"}
    (tmp_path / "results/device-rtx-3090.json").write_text(json.dumps(device))
    monkeypatch.setattr(winograd, "suites", lambda *_: [["suite=nonesuch", "output=x"]])
    text = run("paper=winograd", *folders)
    assert "nonesuch: scripts/benchmark.py has no such suite yet" in text
    text = run("paper=convfirst", "quick=true", *folders)
    quick = tmp_path / "results/quick"
    assert gpu[1:] == [("device", f"{quick}/device-rtx-3090.json"), ("throughput", f"{quick}/throughput-rtx-3090.json")]
    assert "blocks, models: the package convfirst_kernels isn't installed" in text
    assert "Waterline on NVIDIA GeForce RTX 3090: 70 TFLOP/s, 0.85 TB/s (measured)" in text
    assert sorted(path.name for path in (tmp_path / "reports").glob("*.md")) == ["convfirst-quick.md", "winograd.md"]


@pytest.mark.parametrize("paper", ["convfirst", "winograd", "maxdnn"])
@pytest.mark.parametrize("quick", [False, True])
def test_the_suites_options_exist(paper, quick):
    for overrides in reproduce_module.PAPERS[paper].suites(Path("results"), "h100", quick):
        config = hydra.compose("benchmark", overrides=overrides)
        assert config.suite in ("blocks", "models", "throughput", "winograd", "direct")
        assert config.output.startswith("results/") and config.output.endswith("-h100.json")
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def test_interrupted_measuring_replaces_no_result_file_and_goes_on(folders, tmp_path, measured, monkeypatch):
    path, command = tmp_path / "results/winograd-rtx-3090.json", ("paper=winograd", *folders)
    path.write_text(json.dumps({**ABOUT, "rows": [{"shipped": 1}]}))
    shipped = path.read_text()
    measured.fails_at = 3
    with pytest.raises(ValueError, match="interrupted"):
        run(*command)
    assert path.read_text() == shipped and len(measured) == 3
    assert not (tmp_path / "reports/winograd.md").exists()
    run(*command)
    batches = list(winograd.BATCHES)
    parts = [("winograd", "", dtype, batch) for dtype in ("float32", "float16") for batch in batches]
    assert measured == [*parts[:3], *parts[2:]]  # the interrupted one again, those before it not
    assert [(tuple(row["about"]), row["row"]) for row in rows(path)] == [(part, i) for part in parts for i in (1, 2)]
    assert json.loads(path.read_text())["suite"] == "winograd"
    assert not list((tmp_path / "results").rglob("unfinished/*"))
    measured.clear()
    run(*command)
    assert measured == parts  # a run that has ended is not taken up


def test_rows_of_another_commit_are_not_taken_up(folders, tmp_path, measured, monkeypatch, caplog):
    monkeypatch.setenv("GIT_COMMIT", "before")
    measured.fails_at = 2
    with pytest.raises(ValueError, match="interrupted"):
        run("paper=maxdnn", *folders)
    monkeypatch.setenv("GIT_COMMIT", "after")
    measured.clear()
    run("paper=maxdnn", *folders)
    assert measured == [("direct", "", "float16"), ("direct", "", "float32")]
    assert "has commit=before, this run after: measuring anew" in caplog.text
    result = json.loads((tmp_path / "results/direct-rtx-3090.json").read_text())
    assert result["commit"] == "after" and {row["part"] for row in result["rows"]} == {1, 2}


def test_suites_that_are_whole_are_not_measured_again_before_the_run_has_ended(folders, tmp_path, measured):
    results = tmp_path / "results"
    measured.fails_at = 3  # the first of suite=models, after both of suite=blocks
    with pytest.raises(ValueError, match="interrupted"):
        run("paper=convfirst", *folders)
    assert {row["part"] for row in rows(results / "blocks-rtx-3090.json")} == {1, 2}
    assert not (results / "models-rtx-3090.json").exists()
    (results / "blocks-rtx-3090.json").unlink()
    noted = json.loads((results / "unfinished/blocks-rtx-3090.json").read_text())
    write_json(results / "unfinished/blocks-rtx-3090.json", {**noted, "date": "2020-02-02"})
    run("paper=convfirst", *folders)
    assert [part[0] for part in measured].count("blocks") == 2
    again = json.loads((results / "blocks-rtx-3090.json").read_text())
    assert {row["part"] for row in again["rows"]} == {1, 2} and again["date"] == "2020-02-02"
    names = [row["about"][1] for row in rows(results / "throughput-rtx-3090.json") if row["row"] == 1]
    assert names == ["convfirst_tiny", "convnext_tiny", "resnet50"]
    assert not list(results.rglob("unfinished/*"))


def test_code_that_is_not_known_is_not_gone_on_with(folders, measured, monkeypatch):
    monkeypatch.setenv("GIT_COMMIT", "unknown")
    measured.fails_at = 3
    with pytest.raises(ValueError, match="interrupted"):
        run("paper=convfirst", *folders)
    run("paper=convfirst", *folders)
    assert [part[0] for part in measured].count("blocks") == 4


def test_what_is_not_measured_keeps_its_unfinished_rows(folders, tmp_path, measured, monkeypatch):
    measured.fails_at = 2
    with pytest.raises(ValueError, match="interrupted"):
        run("paper=convfirst", *folders)
    without = {suite: why for suite, why in benchmark_module.SUITES.items() if suite != "blocks"}
    monkeypatch.setattr(benchmark_module, "SUITES", without)
    run("paper=convfirst", *folders)
    assert [path.name for path in tmp_path.rglob("unfinished/*")] == ["blocks-rtx-3090.json"]


def test_a_suite_without_rows_leaves_its_file(folders, tmp_path, measured, monkeypatch):
    (tmp_path / "results/blocks-rtx-3090.json").write_text('{"rows": ["shipped"]}')
    monkeypatch.setattr(benchmark_module, "SUITES", {**benchmark_module.SUITES, "blocks": lambda config: []})
    with pytest.raises(ValueError, match="^suite=blocks gave no rows; .*blocks-rtx-3090.json stays as it is$"):
        run("paper=convfirst", *folders)
    assert rows(tmp_path / "results/blocks-rtx-3090.json") == ["shipped"]


def test_reports_must_be_writable_before_anything_is_measured(folders, tmp_path, measured, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "reports")
    with pytest.raises(PermissionError, match="^reports=.*reports: this user may not write to that folder$"):
        run("paper=convfirst", *folders)
    assert not measured


def test_a_whole_run_measures_what_the_shipped_files_show(tmp_path):
    suites = convfirst_paper.suites(tmp_path, "h200", quick=False)
    selects = [hydra.compose("benchmark", overrides=suite) for suite in suites if suite[0] == "suite=models"]
    default = hydra.compose("benchmark").networks
    shipped = rows(REPOSITORY / "results/models-h200.json")
    for name in {row["name"] for row in shipped}:
        assert re.search(default.select, name)
        assert sum(bool(re.search(config.networks.select, name)) for config in selects) == 1
    for config in (default, *(config.networks for config in selects)):
        assert {row["batch"] for row in shipped} <= set(config.batches)
        assert {row["dtype"] for row in shipped} <= set(config.dtypes)
        assert not any(re.search(config.select, name) for name in ("convfirst_atto", "resnet50", "vgg19"))
    blocks = hydra.compose("benchmark", overrides=suites[0]).blocks
    assert {row["dtype"] for row in rows(REPOSITORY / "results/blocks-h200.json")} <= set(blocks.dtypes)
    quick = convfirst_paper.suites(tmp_path, "h200", quick=True)
    assert [len(reproduce_module._parts(suite)) for suite in quick] == [1, 1, 1]


def test_training_runs_train_py_for_each_recipe(folders, tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(
        "import sys\nprint(sys.argv[1:], file=open('ran', 'a'))\nsys.exit('fail' in sys.argv)"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce_module, "REPOSITORY", tmp_path)
    monkeypatch.setattr(convfirst_paper, "sections", lambda findings: ["sections"])
    train = ["paper=convfirst", "train=true", f"data.root={tmp_path}", *folders]
    assert "paper=convfirst train=true" in run(*train, 'train_overrides=["trainer.devices=8"]')
    common = [f"data.root={tmp_path}", f"run_root={tmp_path / 'runs'}", "trainer.devices=8"]
    expected = [str([f"recipe={recipe}", *common]) for recipe in ("convfirst_tiny", "convnext_tiny")]
    assert (tmp_path / "ran").read_text().splitlines() == expected
    with pytest.raises(ValueError, match="train.py recipe=convfirst_tiny ended with status 1"):
        run(*train, "train_overrides=[fail]")


def test_the_report_is_written_before_each_training_and_after_it(folders, tmp_path, measured, monkeypatch):
    report = tmp_path / "reports/convfirst.md"
    (tmp_path / "train.py").write_text(
        "import pathlib, sys\n"
        "done = sorted(path.name for path in pathlib.Path().glob('runs/*'))\n"
        f"assert f'trained: {{done}}' in pathlib.Path({str(report)!r}).read_text()\n"
        "if 'fail' in sys.argv: sys.exit(1)\n"
        "pathlib.Path('runs', sys.argv[1].removeprefix('recipe=')).mkdir(parents=True)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce_module, "REPOSITORY", tmp_path)
    trained = lambda findings: [name for name, path in findings.runs.items() if path.exists()]  # noqa: E731
    monkeypatch.setattr(convfirst_paper, "sections", lambda findings: [f"trained: {trained(findings)}"])
    train = ["paper=convfirst", "train=true", f"data.root={tmp_path}", *folders]
    with pytest.raises(ValueError, match="the report is written .* same command with measure=off goes on from there"):
        run(*train, "train_overrides=[fail]")
    assert "trained: []" in report.read_text()
    parts = len(measured)
    assert parts > 0
    assert "trained: ['convfirst_tiny', 'convnext_tiny']" in run(*train, "measure=off")
    shutil.rmtree(tmp_path / "runs")
    assert len(measured) == parts
    assert "trained: ['convfirst_tiny', 'convnext_tiny']" in run(*train)
    assert len(measured) == 2 * parts  # all had been measured, so that was another run


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([], "give paper=...; accepted: convfirst, winograd, maxdnn"),
        (["paper=alexnet"], "paper='alexnet' is unknown; accepted: convfirst, winograd, maxdnn"),
        (["paper=convfirst", "measure=on"], "measure='on' is unknown; accepted: auto, off"),
        (["paper=winograd", "train=true"], "train=true, but paper=winograd trains nothing"),
        (["paper=convfirst", "train=true"], "train=true needs ImageNet: give data.root=FOLDER"),
        (["paper=convfirst", "train=true", "data.root=/nowhere"], "data.root=/nowhere: no such folder"),
        (
            ["paper=convfirst", "recipes=[convfirst_tiny,foo]"],
            "recipes=[foo] is unknown; accepted: convfirst_base, con",
        ),
        (["paper=convfirst", "results=/nosuch"], "results=/nosuch: no such folder, and nothing is measured into it: "),
    ],
)
def test_bad_options_are_named(overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        run(*overrides)


def test_results_may_be_a_new_folder_where_something_is_measured_into_it(folders, tmp_path, measured):
    new = f"results={tmp_path / 'new'}"
    with pytest.raises(FileNotFoundError, match="/new: no such folder, and nothing is measured into it: measure=off"):
        run("paper=maxdnn", *folders, new, "measure=off")
    run("paper=maxdnn", *folders, new)
    assert len(rows(tmp_path / "new/direct-rtx-3090.json")) == 4


def test_recipes_are_checked_before_anything_is_measured(folders, gpu, measured):
    with pytest.raises(ValueError, match=r"recipes=\[foo\] is unknown"):
        run("paper=convfirst", "recipes=[foo]", *folders)
    assert not gpu and not measured


def test_device_measurement_writes_what_the_analysis_reads(tmp_path):
    options = ["device=cpu", "bytes=40000", "size=32", "iterations=2", "warmup=1", "dtypes=[float32]"]
    path = measure_device(
        hydra.compose("measure_device", overrides=[*options, f"output={tmp_path / 'device-cpu.json'}"])
    )
    result = json.loads(path.read_text())
    assert result["measured"]["bandwidth_tbps"] == max(result["options"]["bandwidths_tbps"].values()) > 0
    assert set(result["measured"]["tflops"]) == {"float32"} and result["device"]
    with pytest.raises(ValueError, match="dtypes='int4' is unknown; accepted: float16"):
        measure_device(hydra.compose("measure_device", overrides=["device=cpu", "dtypes=[int4]"]))
    with pytest.raises(ValueError, match="device='cuda', but there is no CUDA device here"):
        measure_device(hydra.compose("measure_device"))


def test_winograd_arithmetic():
    layer = ConvLayer("4.2", 512, 28, 28, 512)
    tile = WinogradTile(2, 3, data=32, filter=28, inverse=24)
    assert (tile.name, tile.saving, tile.tiles(layer)) == ("F(2x2,3x3)", 2.25, 14 * 14)
    products = 14 * 14 * 16 * 512 * 512
    assert tile.flops(layer, 1) == 2 * products + 14 * 14 * (32 + 24) * 512 + 28 * 512 * 512
    assert 2.2 < tile.speedup_bound(layer, 64) < 2.25
    odd = ConvLayer("5", 512, 14, 14, 512)
    assert WinogradTile(4, 3, 144, 72, 100).tiles(odd) == 4 * 4  # 14 rows need four tiles of 4
    with pytest.raises(ValueError, match=r"F\(2x2,3x3\) needs 3x3 filters and stride 1; conv1 has others"):
        tile.flops(ConvLayer("conv1", 3, 227, 227, 64, kernel_size=11, stride=4, padding=0), 1)
    with pytest.raises(ValueError, match=r"transforms' costs of F\(3x3,2x2\) are not known"):
        WinogradTile(3, 2).flops(ConvLayer("2x2", 8, 8, 8, 8, kernel_size=2, padding=0), 1)


def test_convolution_arithmetic():
    conv1 = ConvLayer("conv1", 3, 227, 227, 64, kernel_size=11, stride=4, padding=0)
    assert (conv1.output_height, conv1.macs) == (55, 55 * 55 * 64 * 3 * 121)
    assert conv1.bytes(2) == 2 * (2 * 3 * 227 * 227 + 2 * 64 * 55 * 55 + 64 * 3 * 121)
    assert tile_quantisation(ConvLayer("L1", 3, 231, 231, 96, 11, 4, 0), 128, 64) == 0.75
    assert sum(2e-9 * layer.macs * layer.depth for layer in winograd.LAYERS) == pytest.approx(39.02, abs=0.005)
