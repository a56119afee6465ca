"""The scripts around results/: README's figures are those measured, and the GPU tests are counted right."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
RESULTS = {
    "device": "GPU",
    "date": "2026-01-02",
    "commit": "0123456789abcdef",
    "versions": {"torch": "2.14.1"},
    "rows": [
        {"name": "a", "path": "eager", "ms": 1.23456, "rate": 12345.6, "none": None},
        {"name": "a", "path": "fused", "ms": 0.5, "rate": 2.0, "none": None},
    ],
}


@pytest.fixture
def render(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    from render_results import render

    return render


def readme(request: str) -> str:
    return f"before\n<!-- {request} -->\nold\n<!-- end -->\nafter\n"


def test_table_shows_the_chosen_columns_and_rows(render, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(RESULTS))
    text = render(readme("table r.json name:model ms rate:images/s none where path=eager"), tmp_path)
    assert "| model | ms | images/s | none |\n| --- | --- | --- | --- |\n| a | 1.23 | 12,346 | – |\n\n" in text
    assert "Measured on GPU, 2026-01-02, commit 0123456789, PyTorch 2.14.1." in text
    assert "old" not in text and text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    assert render(text, tmp_path) == text


def test_a_file_without_rows_is_one_row(render, tmp_path):
    (tmp_path / "r.json").write_text(
        json.dumps({key: RESULTS[key] for key in RESULTS if key != "rows"} | {"failed": 3})
    )
    text = render(readme("table r.json device failed:red"), tmp_path)
    assert "| device | red |\n| --- | --- |\n| GPU | 3 |\n\nMeasured on GPU," in text


def test_plot_is_drawn_and_linked(render, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/r.json").write_text(json.dumps(RESULTS))
    text = render(readme("plot results/r.json ms by name over path"), tmp_path)
    assert "![ms by name](results/r-ms.png)" in text
    assert (tmp_path / "results/r-ms.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_not_measured_is_said(render, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(RESULTS))
    for request in ("table missing.json name", "table r.json name where path=other"):
        assert "\nNot measured yet.\n<!-- end -->" in render(readme(request), tmp_path)


def test_the_readme_is_up_to_date():
    command = [sys.executable, str(REPOSITORY / "scripts/render_results.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run_gpu_test(tmp_path, available: bool) -> subprocess.CompletedProcess:
    program = f"""
import sys, torch
torch.cuda.is_available = lambda: {available}
torch.cuda.get_device_name = lambda: "GPU"
torch.backends.cudnn.version = lambda: 90000
sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "scripts")!r}]
import gpu_test
gpu_test.RESULTS = gpu_test.Path({str(tmp_path / "gpu-tests.json")!r})
sys.exit(gpu_test.main([{str(tmp_path)!r}]))
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)


# Both run the script with a pretended device, in a process of its own.
def test_gpu_tests_are_counted_and_named_by_tree(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELS_TREE", "cafe")
    (tmp_path / "test_some.py").write_text("""
import pytest

@pytest.fixture
def broken():
    raise RuntimeError

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(3))
def test_good(i): pass

@pytest.mark.gpu
def test_bad(): assert False

@pytest.mark.gpu
def test_broken(broken): pass

@pytest.mark.gpu
def test_other(): pytest.skip("not here")

def test_without_a_gpu(): assert False
""")
    done = run_gpu_test(tmp_path, available=True)
    assert done.returncode == 1, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu-tests.json").read_text())
    assert {key: result[key] for key in ("passed", "failed", "skipped")} == {"passed": 3, "failed": 2, "skipped": 1}
    assert result["kernels_tree"] == "cafe"
    assert result["device"] == "GPU"
    assert {"date", "commit", "versions"} <= result.keys()


def test_gpu_tests_need_a_gpu(tmp_path):
    done = run_gpu_test(tmp_path, available=False)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "gpu-tests.json").exists()


@pytest.mark.parametrize("script", ["make_sample_imagenet.py", "write_ffcv.py"])
def test_scripts_say_what_they_take(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / "scripts" / script), run_name="__main__")
    assert ended.value.code == 0
    assert "--workers" in capsys.readouterr().out


@pytest.fixture
def sanitize(tmp_path, monkeypatch):
    """scripts/sanitize.py with a compute-sanitizer that finds what each tool might find."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("""#!/bin/sh
echo "   0.0 s  part case"
case $2 in
  memcheck) echo "========= Invalid __global__ read of size 4 bytes"; echo "========= ERROR SUMMARY: 2 errors" ;;
  racecheck) echo "========= Warning: Race reported between Write access and Read access"
    echo "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)" ;;
  initcheck) echo "========= Uninitialized __global__ memory read of size 4 bytes"; exec sleep 60 ;;
  synccheck) echo "AssertionError: not finite" ; exit 1 ;;
esac
echo "   1.0 s  done"
""")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("KERNELS_TREE", "cafe")
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    import sanitize

    return sanitize


def test_what_each_sanitizer_finds_is_counted(sanitize, tmp_path):
    output = tmp_path / "sanitizers.json"
    options = ["--parts", "blocks", "--jobs", "4", "--seconds", "2", "--output", str(output)]
    assert sanitize.main(options) == 1
    result = json.loads(output.read_text())
    rows, totals = result["rows"][:4], result["rows"][4:]
    found = {row["tool"]: (row["errors"], row["warnings"], row["cases"], row["finished"]) for row in rows}
    assert found == {
        "memcheck": (2, 0, 1, True),
        "racecheck": (0, 2, 1, True),
        "initcheck": (1, 0, 1, False),
        "synccheck": (0, 0, 1, False),
    }
    assert [row["errors"] for row in totals] == [2, 0, 1, 0] and {row["part"] for row in totals} == {"all"}
    assert rows[0]["first"] == "Invalid __global__ read of size 4 bytes"
    assert rows[3]["first"] == "AssertionError: not finite"
    assert result["kernels_tree"] == "cafe"


def test_parts_not_begun_in_time_are_recorded(sanitize, tmp_path):
    output = tmp_path / "sanitizers.json"
    options = ["--tools", "initcheck", "--jobs", "1", "--seconds", "1", "--output", str(output)]
    assert sanitize.main(options) == 1
    rows = json.loads(output.read_text())["rows"]
    parts = [part for part in sanitize.PARTS if ("initcheck", part) not in sanitize.LEFT_OUT]
    assert [row["part"] for row in rows] == [*parts, "all"]
    assert [row["cases"] for row in rows] == [1, *[0] * (len(rows) - 2), 1]


def test_the_parts_are_those_of_the_program(sanitize):
    program = (REPOSITORY / "kernels/tests/sanitize.py").read_text()
    assert sorted(sanitize.PARTS) == sorted(re.findall(r'^    "(\w+)": \w+,$', program, re.MULTILINE))
