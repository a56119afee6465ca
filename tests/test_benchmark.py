import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hydra
import pytest
import torch

from convfirst.app import benchmark as benchmark_module
from convfirst.app import training_step as training_step_module
from convfirst.app import training_throughput as training_throughput_module
from convfirst.app.bare_loop import bare_loop
from convfirst.app.benchmark import SUITES, benchmark
from convfirst.app.kernels_agreement import compare, pairs_of
from convfirst.app.results import REPOSITORY, environment, git_object, gpu_slug, kept_rows, write_results
from convfirst.app.timing import median_ms

CONFIGS = str(Path(__file__).parents[1] / "configs")
SMALL = ["device=cpu", "dtype=float32", "models=[convfirst_atto]", "image_size=32"]
SMALL += ["iterations=2", "warmup=1", "inputs=2"]


@pytest.fixture(autouse=True)
def _hydra():
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        yield


def compose(*overrides: str):
    return hydra.compose("benchmark", overrides=list(overrides))


@pytest.mark.parametrize("suite", ["throughput", "latency"])
def test_inference_rows_are_written_with_their_circumstances(tmp_path, monkeypatch, suite):
    monkeypatch.setenv("GIT_COMMIT", "0123abc")
    output = tmp_path / "out.json"
    rows = benchmark(
        compose(*SMALL, f"suite={suite}", f"output={output}", f"{suite}.modes=[eager]", f"{suite}.batches=[1,2]")
    )
    written = json.loads(output.read_text())
    assert written["rows"] == rows
    assert written["commit"] == "0123abc"
    assert torch.__version__.startswith(written["versions"]["torch"])
    assert written["device"] and written["date"]
    assert [row["batch"] for row in rows] == [1, 2]
    assert all(row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms"], rel=0.01) for row in rows)
    assert rows[0]["mparams"] == 1.312


def test_cost_counts_without_computing(tmp_path):
    (row,) = benchmark(compose("suite=cost", "cost.models=[convnext_tiny]", f"output={tmp_path / 'out.json'}"))
    assert (row["gmacs"], row["mparams"]) == (4.456, 28.589)  # ConvNeXt's README: 4.5 G, 29 M


def test_training_is_held_against_the_bare_loop(tmp_path):
    sources = '{synthetic: ["data=synthetic","augment=none","model=convfirst_atto","data.image_size=32"]}'
    small = ["batch=4", "precision=32-true", "compile=false", "steps=4", "warmup_steps=2", "interval=2"]
    options = [f"training_throughput.{option}" for option in (*small, "recipes=[convfirst_nano]", f"sources={sources}")]
    overrides = 'training_throughput.overrides=["ema=null","data.num_train_images=1000","trainer.accelerator=cpu"]'
    (row,) = benchmark(compose("suite=training_throughput", f"output={tmp_path / 'out.json'}", overrides, *options))
    assert row["model"] == "convfirst_atto"
    assert row["images_per_s"] > 0
    rounded = 0.05 / row["images_per_s"] + 0.05 / row["bare_images_per_s"]  # relative; a busy machine makes it large
    expected = pytest.approx(row["images_per_s"] / row["bare_images_per_s"], rel=2 * rounded, abs=1e-4)
    assert row["ratio_to_bare"] == expected
    assert 0 <= row["data_wait"] < 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_devices_train_by_the_strategy_asked_for(strategy, monkeypatch):
    trained = []

    def run_trainer(overrides, devices, warmup_steps):
        trained.extend(overrides)
        return {"images_per_s": 10.0, "data_wait": 0.0, "peak_memory_gib": 1.0}

    monkeypatch.setattr(training_throughput_module, "run_trainer", run_trainer)
    monkeypatch.setattr(training_throughput_module, "run_bare_loop", lambda arguments, devices: {"images_per_s": 20.0})
    options = ["devices=[2]", f"strategy={strategy}", "recipes=[convfirst_nano]"]
    config = compose("suite=training_throughput", *(f"training_throughput.{option}" for option in options))
    (row,) = training_throughput_module.training_throughput(config)
    assert f"trainer={strategy}" in trained
    assert (row["strategy"], row["devices"], row["ratio_to_bare"]) == (strategy, 2, 0.5)
    config.training_throughput.bare = False
    (row,) = training_throughput_module.training_throughput(config)
    assert (row["images_per_s"], row["bare_images_per_s"], row["ratio_to_bare"]) == (10.0, None, None)


def test_stopping_the_suite_ends_the_workers_of_torchrun(tmp_path):
    worker = "import os, pathlib, time; pathlib.Path(os.sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
    (tmp_path / "worker.py").write_text(worker)
    arguments = ["-m", "torch.distributed.run", "--standalone", str(tmp_path / "worker.py"), str(tmp_path / "pid")]
    # A shell that starts tests in the background lets them ignore SIGINT, and their children inherit that.
    heed = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = heed + "from convfirst.app.training_throughput import _run; _run(sys.argv[1:])"
    suite = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=REPOSITORY, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (pid := tmp_path / "pid").exists() or not pid.read_text():
        assert suite.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    suite.send_signal(signal.SIGINT)
    assert suite.wait(timeout=90) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_steps_on_several_devices_without_a_peer(monkeypatch):
    measured = []

    def bare_loop(model, kernels, **options):
        measured.append((model, kernels))
        return {"images_per_s": 10.0, "ms": 1.0, "peak_memory_gib": None}

    several = {"images_per_s": 19.0, "ms": 1.0, "peak_memory_gib": None}
    monkeypatch.setattr(training_step_module, "bare_loop", bare_loop)
    monkeypatch.setattr(training_step_module, "run_bare_loop", lambda arguments, devices: several)
    options = ["models=[convfirst_atto]", "peers=null", "devices=[1,2]", "modes=[eager]"]
    (row,) = training_step_module.training_step(
        compose("suite=training", *(f"training.{option}" for option in options))
    )
    assert measured == [("convfirst_atto", "required")]
    assert (row["devices"], row["scaling"]) == (2, 1.9)


def test_steps_with_kernels_are_held_against_the_same_model_and_its_peer(tmp_path, capsys):
    pytest.importorskip("convfirst_kernels")
    options = ["models=[convfirst_atto]", "batches=[2]", "modes=[eager]"]
    options += ["kernels=reference", "precision=32-true", "image_size=32", "steps=2", "warmup_steps=1", "interval=1"]
    options = [f"training.{option}" for option in options] + ["+training.peers.convfirst_atto=[convnext_atto]"]
    rows = benchmark(compose("suite=training", f"output={tmp_path / 'out.json'}", *options))
    assert [row["peer"] for row in rows] == ["convfirst_atto", "convnext_atto"]
    for row in rows:
        assert row["speedup"] == pytest.approx(row["images_per_s"] / row["peer_images_per_s"], rel=0.02, abs=1e-3)
        assert row["images_per_s"] == pytest.approx(2e3 / row["ms"], rel=0.02)
    assert rows[0]["images_per_s"] == rows[1]["images_per_s"]  # measured once
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")] == rows


def test_runs_with_and_without_kernels_are_compared(tmp_path):
    pytest.importorskip("convfirst_kernels")
    small = ["epochs=1", "scheduler.warmup_epochs=0", "trainer.accelerator=cpu", "trainer.limit_train_batches=3"]
    small += ["+model.dims=[8,16]", "+model.depths=[1,1]", "trainer.log_every_n_steps=1", "data.image_size=16"]
    options = ["workloads={}", "tree.train_images=1", "kernels=reference", "precision=32-true", "jobs=2"]
    options = [f"kernels_agreement.{option}" for option in options]
    config = compose("suite=kernels_agreement", f"output={tmp_path / 'out.json'}", *options)
    config.kernels_agreement.workloads = {"digits": {"recipe": "digits", "overrides": small, "seeds": [0]}}
    plain, fused, compared = benchmark(config)
    assert {plain["kernels"], fused["kernels"]} == {"off", "reference"}
    assert len(plain["curve"]) == 3
    for a, b in zip(plain["curve"], fused["curve"], strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert compared["top1_difference"] == pytest.approx(0, abs=0.3)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    config.append, config.kernels_agreement.jobs = True, 0  # no run may start
    assert benchmark(config) == [compared]
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == [plain, fused, compared]
    config.kernels_agreement.workloads.digits.overrides.append("optimizer.lr=1e-4")
    config.kernels_agreement.seconds = 0  # others would start, and have no time
    assert benchmark(config) == []


def test_runs_that_do_not_end_in_time_are_left_out(tmp_path):
    options = [f"kernels_agreement.{option}" for option in ("workloads={}", "tree.train_images=1", "seconds=0")]
    config = compose("suite=kernels_agreement", f"output={tmp_path / 'out.json'}", *options)
    config.kernels_agreement.workloads = {"digits": {"recipe": "digits", "overrides": [], "seeds": [0]}}
    assert benchmark(config) == []


def test_seeds_with_both_runs_are_compared():
    ended = [("a", 0, "off"), ("a", 1, "off"), ("a", 1, "required"), ("b", 0, "off")]
    rows = [{"workload": workload, "seed": seed, "kernels": kernels} for workload, seed, kernels in ended]
    assert pairs_of(rows) == rows[1:3]


def test_a_difference_is_judged_by_the_spread_over_seeds():
    def runs(kernels, losses):
        about = {"workload": "w", "model": "m", "precision": "p", "updates": 1, "test_images": 100, "kernels": kernels}
        return [about | {"seed": seed, "top1": 90.0, "loss": loss} for seed, loss in enumerate(losses)]

    near = compare(runs("off", [1.0, 1.2, 1.1]) + runs("required", [1.15, 1.05, 1.2]))
    assert near["agree"] and near["loss_difference"] == pytest.approx(0.0333, abs=1e-4)
    far = compare(runs("off", [1.0, 1.02, 1.01]) + runs("required", [1.15, 1.14, 1.16]))
    assert not far["agree"] and far["loss_noise"] == pytest.approx(2 * (2 * 1e-4 / 3) ** 0.5, rel=0.01)


def test_sources_are_measured_on_the_same_images(tmp_path):
    options = ["tree={num_classes: 2, train_images: 3, val_images: 1, min_side: 40, max_side: 60}", "links=1"]
    options += ["seconds=0.1", "warmup_seconds=0", f"folder={tmp_path}"]
    config = compose("suite=data_loading", f"output={tmp_path / 'out.json'}", *(f"data_loading.{o}" for o in options))
    config.data_loading.overrides = ["data.num_workers=1", "data.image_size=32"]
    for source in config.data_loading.sources.values():
        source.overrides.append("data.batch_size=4")
    if importlib.util.find_spec("ffcv") is None:
        config.data_loading.sources = {"image_folder": config.data_loading.sources.image_folder}
    rows = {row["name"]: row for row in benchmark(config)}
    assert list(rows) == list(config.data_loading.sources)
    assert all(row["images_per_s"] > 0 and row["workers"] == 1 and row["processor"] for row in rows.values())
    assert 500 < rows["image_folder"]["bytes_per_image"] < 5000
    assert not list(tmp_path.glob("tmp*"))


def test_bare_loop_measures_any_timm_model():
    short = dict(steps=2, warmup_steps=1, interval=1)
    result = bare_loop("convfirst_atto", {}, batch=2, image_size=32, precision="32-true", compile=False, **short)
    assert result["images_per_s"] > 0


def test_timing_takes_the_inputs_in_turn():
    seen = []
    inputs = [torch.zeros(1), torch.ones(1)]
    assert median_ms(lambda x: seen.append(x.item()), inputs, warmup=1, iterations=4) >= 0
    assert seen == [0, 0, 1, 0, 1]


def test_append_keeps_rows_of_the_same_circumstances_only(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    measured = []

    def suite(config):
        measured.append(len(measured) + 1)
        yield {"a": measured[-1]}

    monkeypatch.setattr(benchmark_module, "SUITES", {**SUITES, "mine": suite})
    assert kept_rows(path, environment()) == []
    for expected in ([{"a": 1}], [{"a": 1}, {"a": 2}]):
        benchmark(compose("suite=mine", f"output={path}", "append=true"))
        assert json.loads(path.read_text())["rows"] == expected
    monkeypatch.setenv("GIT_COMMIT", "another")
    with pytest.raises(ValueError, match="append=true, but .* has commit="):
        benchmark(compose("suite=mine", f"output={path}", "append=true"))
    assert measured == [1, 2]  # refused before it measures
    benchmark(compose("suite=mine", f"output={path}"))
    assert json.loads(path.read_text())["rows"] == [{"a": 3}]
    assert list(tmp_path.iterdir()) == [path]


def test_commit_of_the_environment_wins_and_its_lack_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert environment()["commit"] == "abc"
    monkeypatch.delenv("GIT_COMMIT")
    monkeypatch.setattr("convfirst.app.results.REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_object("HEAD", variable="GIT_COMMIT") == "unknown"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["suite=speed"],
            "suite='speed' is unknown; accepted: throughput, latency, cost, training_throughput, blocks, models, "
            "winograd, direct, counters, training, kernels_agreement, data_loading",
        ),
        (["suite=blocks"], "suite=blocks times CUDA kernels, but there is no CUDA device here"),
        (["dtype=int8"], "dtype='int8' is unknown; accepted: float32, float16, bfloat16"),
        (["kernels=on"], "kernels='on' must be one of auto, required, off"),
        (["suite=training", "training.modes=[jit]"], "modes='jit' is unknown; accepted: eager, eager.graph, inductor"),
        (["throughput.modes=[jit]"], "modes='jit' is unknown; accepted: eager, eager.graph, inductor"),
        (["throughput.modes=[eager+graph]"], "needs a CUDA device, but device='cpu'"),
    ],
)
def test_bad_options_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        benchmark(compose(*SMALL, *overrides))


def test_missing_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda', but there is no CUDA device here"):
        benchmark(compose(*SMALL, "device=cuda"))


def test_suites_are_found_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_module, "SUITES", {**SUITES, "mine": lambda config: [{"name": config.suite}]})
    assert benchmark(compose("suite=mine", f"output={tmp_path / 'out.json'}")) == [{"name": "mine"}]


def test_a_commit_made_meanwhile_stops_no_measurement(monkeypatch, tmp_path):
    path = tmp_path / "out.json"

    def suite(config):
        for name in ("before", "after"):
            monkeypatch.setenv("GIT_COMMIT", name)
            yield {"name": name}

    monkeypatch.setenv("GIT_COMMIT", "measured")
    monkeypatch.setattr(benchmark_module, "SUITES", {**SUITES, "mine": suite})
    rows = benchmark(compose("suite=mine", f"output={path}"))
    assert json.loads(path.read_text())["rows"] == rows == [{"name": "before"}, {"name": "after"}]
    assert json.loads(path.read_text())["commit"] == "measured"


def test_rows_are_written_as_they_come(monkeypatch, tmp_path):
    path = tmp_path / "out.json"
    write_results(path, "mine", [{"a": 0}])

    def suite(config):
        yield {"a": 1}
        assert json.loads(path.read_text())["rows"] == [{"a": 1}]
        yield {"a": 2}
        raise ValueError("interrupted")

    monkeypatch.setattr(benchmark_module, "SUITES", {**SUITES, "mine": suite})
    with pytest.raises(ValueError, match="interrupted"):
        benchmark(compose("suite=mine", f"output={path}"))
    assert json.loads(path.read_text())["rows"] == [{"a": 1}, {"a": 2}]


def test_the_kernels_own_script_writes_rows_as_they_come(monkeypatch, tmp_path):
    pytest.importorskip("convfirst_kernels")
    monkeypatch.syspath_prepend(Path(CONFIGS).parent / "kernels/benchmarks")
    run = importlib.import_module("run")
    path = tmp_path / "out.json"
    columns = ("name", "batch", "dtype", "path", "ours_ms", "peer", "peer_ms", "speedup", "tflops", "efficiency")
    row = dict.fromkeys(columns, 1)

    def suite(iterations=1):
        yield row
        assert json.loads(path.read_text())["rows"] == [row]
        raise ValueError("interrupted")

    monkeypatch.setitem(run.SUITES, "blocks", suite)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90000)
    with pytest.raises(ValueError, match="interrupted"):
        run.main(["blocks", "--output", str(path), "--iterations", "2"])
    written = json.loads(path.read_text())
    assert (written["suite"], written["device"], written["rows"]) == ("blocks", "GPU", [row])


def test_nothing_is_timed_before_all_are_prepared_nor_beside_another(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(CONFIGS).parent / "kernels/benchmarks")
    turns = importlib.import_module("turns")
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    events, both = [], threading.Barrier(2)

    def job(name):
        both.wait(timeout=60)  # two jobs of two processes
        events.append("prepared")
        yield None
        for _ in range(3):
            events.append(name)
            time.sleep(0.01)
            yield {"name": name}

    def process(name):
        rows = list(turns.measured((job(name) for _ in range(2)), str(tmp_path / "turn")))
        assert rows == [{"name": name}] * 6

    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(process, name) for name in "ab"]:
            future.result(timeout=60)
    assert events[:4] == ["prepared"] * 4
    assert "".join(events[4:]) in ("aaaaaabbbbbb", "bbbbbbaaaaaa")
    assert list(turns.measured(iter([iter([None, 1]), iter([None, 2])]), None)) == [1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "eager+graph", "inductor", "inductor+graph"])
def test_modes_on_a_gpu(tmp_path, mode):
    overrides = ["device=cuda", "dtype=float16", f"throughput.modes=[{mode}]", "throughput.batches=[2]"]
    (row,) = benchmark(compose(*SMALL, *overrides, f"output={tmp_path / 'out.json'}"))
    assert row["ms"] > 0 and row["peak_memory_mib"] > 0


@pytest.mark.parametrize(
    "name, slug",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA RTX A5000", "a5000"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_short_names_are_those_of_the_shipped_devices(name, slug):
    assert gpu_slug(name) == slug
