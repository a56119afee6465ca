"""How the library is built: no register spills, PyTorch's stable ABI alone, no CUDA driver needed to load it."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convfirst_kernels import library

KERNELS = Path(__file__).parents[1]
SPILLING = """\
ptxas info    : Compiling entry function '_Z4fineILi1EEvv' for 'sm_80'
ptxas info    : Function properties for _Z4fineILi1EEvv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compiling entry function '_Z4fineILi1EEvv' for 'sm_90a'
ptxas info    : Function properties for _Z4fineILi1EEvv
    16 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
SERIALISED = """\
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the wgmma pipeline in the function '_Z4slowv'
"""


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, KERNELS / "cmake" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compiler(tmp_path):
    """A stand-in for nvcc that prints a log and writes its output file; returns the command for a given log."""

    def command(log: str) -> list[str]:
        fake = tmp_path / "nvcc.py"
        fake.write_text(
            "import pathlib, sys\n"
            f"print({log!r})\n"
            "pathlib.Path(sys.argv[sys.argv.index('-o') + 1]).write_text('object')\n"
        )
        return [sys.executable, str(fake), "-c", "kernel.cu"]

    return command


def run_compile(tmp_path, command, *options):
    target = tmp_path / "objects/kernel.cu.o"
    arguments = [sys.executable, str(KERNELS / "cmake/compile_cuda.py"), "compile", *options, "--object", str(target)]
    return target, subprocess.run([*arguments, "--", *command], capture_output=True, text=True)


def test_a_spill_fails_the_build(tmp_path, compiler):
    target, done = run_compile(tmp_path, compiler(SPILLING))
    assert done.returncode != 0
    assert "_Z4fineILi1EEvv for sm_90a: 24 bytes of spill stores, 28 of loads" in done.stderr
    assert not target.exists()


def test_serialised_wgmma_fails_the_build(tmp_path, compiler):
    target, done = run_compile(tmp_path, compiler(SERIALISED))
    assert done.returncode != 0 and "serialized" in done.stderr
    assert not target.exists()


def test_an_exempt_source_may_spill_and_is_recorded(tmp_path, compiler):
    target, done = run_compile(tmp_path, compiler(SPILLING), "--spills-allowed")
    assert done.returncode == 0, done.stderr
    table = json.loads(Path(f"{target}.json").read_text())["_Z4fineILi1EEvv"]
    assert table["sm_80"] == {
        "registers": 168, "spill_loads": 0, "spill_stores": 0, "stack": 0, "static_shared_memory": 512,
    }  # fmt: skip
    assert table["sm_90a"]["registers"] == 255


def test_a_failing_compiler_fails_the_build(tmp_path):
    _, done = run_compile(tmp_path, [sys.executable, "-c", "import sys; print('error: no'); sys.exit(2)"])
    assert done.returncode == 2 and "error: no" in done.stdout


def test_unknown_toolkit_choice(monkeypatch):
    monkeypatch.setenv("CONVFIRST_KERNELS_CUDA", "conda")
    with pytest.raises(SystemExit, match="CONVFIRST_KERNELS_CUDA='conda'; it is 'pypi', 'system' or unset"):
        script("locate").nvcc()


def test_missing_toolkit(monkeypatch):
    monkeypatch.setenv("CONVFIRST_KERNELS_CUDA", "system")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    with pytest.raises(SystemExit, match="no nvcc found: pip install nvidia-cuda-nvcc"):
        script("locate").nvcc()


@pytest.mark.skipif(not shutil.which("nm"), reason="needs binutils")
def test_library_uses_the_stable_abi_only():
    """Every symbol that the library takes from PyTorch is a C function of its stable ABI."""
    done = subprocess.run(["nm", "-D", "--undefined-only", library.library_path()], capture_output=True, text=True)
    names = [line.split()[-1].split("@")[0] for line in done.stdout.splitlines()]
    torch_names = [name for name in names if "torch" in name or "c10" in name or "3at6" in name]
    assert torch_names
    assert not [name for name in torch_names if not name.startswith(("aoti_torch_", "torch_"))]


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs binutils")
def test_library_loads_without_a_driver_or_python():
    done = subprocess.run(["readelf", "-d", library.library_path()], capture_output=True, text=True)
    needed = [line.split("[")[1].rstrip("]") for line in done.stdout.splitlines() if "NEEDED" in line]
    assert "libtorch.so" in needed
    assert not [name for name in needed if name.startswith(("libcuda", "libpython", "libtorch_cuda", "libc10"))]


def test_kernels_do_not_spill():
    """Those that CMakeLists.txt exempts may: scalars and addresses, so many bytes at most."""
    table = library.resource_table()
    if not table:
        pytest.skip("built without kernels")
    exempt = {
        r"conv_first_block_fwd_sm90.*Li192E": 256,
        r"conv_first_block_fwd_sm90.*Li256E": 256,
        r"feed_forward_fwd_sm90.*Li256E": 192,
        r"winograd.*(fused_fwd|products_fwd|output_transform)_sm80": 24,
    }
    for name, rows in table.items():
        bound = next((size for pattern, size in exempt.items() if re.search(pattern, name)), 0)
        assert all(row["spill_stores"] <= bound for row in rows.values()), name
