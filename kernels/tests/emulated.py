"""The portable kernels of one folder of csrc, compiled for the CPU against the stand-ins of the folder emulation."""

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1]
EMULATION = Path(__file__).parent / "emulation"
DTYPES = ("float16", "bfloat16")
ACTIVATIONS = ("relu", "silu", "gelu")


class CDevice(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("capability", "multiprocessors", "max_shared_memory")]


H100 = CDevice(90, 132, 232448)
A100 = CDevice(80, 108, 166912)
RTX_3090 = CDevice(86, 82, 101376)


class Emulated:
    """The compiled rows of a folder of csrc."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self._library.emulate_name.restype = ctypes.c_char_p
        self.names = [self._library.emulate_name(i).decode() for i in range(self._library.emulate_rows())]

    def launch(
        self,
        name: str,
        problem: ctypes.Structure,
        tensors: ctypes.Structure,
        device: CDevice,
        at_once: bool,
        backwards: bool,
    ) -> bool:
        """Runs a row, copies landing at once or as late as they may, warps in either order; False: not covered."""
        pieces = (ctypes.byref(part) for part in (problem, tensors, device))
        status = self._library.emulate(self.names.index(name), *pieces, at_once, backwards)
        assert status in (0, -1)
        return status == 0


def emulated(algorithm: str, tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """Its portable rows."""
    return Emulated(built(algorithm, tmp_path_factory))


def built(algorithm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of a folder of csrc, built once a run, also where several workers share the run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    target = shared / f"emulated_{algorithm}.so"
    with open(shared / f"emulated_{algorithm}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _build(algorithm, tmp_path_factory.mktemp(f"emulated_{algorithm}"), target)
    return target


def _build(algorithm: str, folder: Path, target: Path) -> None:
    locate = [sys.executable, str(KERNELS / "cmake/locate.py"), "nvcc"]
    nvcc = subprocess.run(locate, capture_output=True, text=True).stdout.strip()
    if not shutil.which("g++") or not nvcc:
        pytest.skip("needs g++ and the CUDA headers")
    for part in ("common", "block_fusion", "mbconv", "patch"):
        shutil.copytree(KERNELS / "csrc" / part, folder / part)
    for stand_in in ("ptx.cuh", "mma_1688.cuh", "half2.cuh", "launch.cuh", "cuda_on_cpu.h"):
        shutil.copy(EMULATION / stand_in, folder / "common" / stand_in)
    for stand_in in ("again", "grid_sm90", "sm90"):
        shutil.copy(EMULATION / f"conv_norm_sm90/{stand_in}.cuh", folder / "common")
    shutil.copy(EMULATION / "patch/sync.cuh", folder / "patch/sync.cuh")
    include = Path(nvcc).parents[1] / "include"
    command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", f"-DEMULATED={algorithm}"]
    command += [f"-I{path}" for path in (folder, include, include / "cccl")]
    if algorithm == "patch":
        sources = [folder / "patch/patch_sm80.cu", EMULATION / "patch/emulate.cpp"]
    else:
        sources = [*(folder / algorithm / "instantiations_sm80").glob("*.cu"), folder / algorithm / "variants_sm80.cpp"]
        sources.append(EMULATION / "emulate.cpp")

    def compile_one(source: Path) -> str:
        output = folder / f"{source.stem}.o"
        subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(output)], check=True)
        return str(output)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run(["g++", "-shared", *objects, "-o", str(target)], check=True)
