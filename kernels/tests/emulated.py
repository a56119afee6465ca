"""Code of csrc compiled for the CPU: kernels against the stand-ins of the folder emulation, planners as they are."""

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1]
CSRC = KERNELS / "csrc"
EMULATION = Path(__file__).parent / "emulation"
MINUTE = 60
DTYPES = ("float16", "bfloat16")
ACTIVATIONS = ("relu", "silu", "gelu")


class CDevice(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("capability", "multiprocessors", "max_shared_memory")]


H100 = CDevice(90, 132, 232448)
A100 = CDevice(80, 108, 166912)
RTX_3090 = CDevice(86, 82, 101376)


class CBlockProblem(ctypes.Structure):
    """block_fusion::Problem."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "height", "width")]
    _fields_ += [(n, ctypes.c_int) for n in "channels hidden kernel_size group_width dtype activation".split()]
    _fields_ += [("has_norm", ctypes.c_bool)]


class CBlockTensors(ctypes.Structure):
    """block_fusion::Tensors."""

    _fields_ = [(f"tensor{i}", ctypes.c_void_p) for i in range(12)] + [("eps", ctypes.c_float)]


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


def library(
    name: str,
    algorithm: str,
    tmp_path_factory: pytest.TempPathFactory,
    sources: Iterable[str],
    stand_ins: Mapping[str, Iterable[str]],
    *options: str,
) -> ctypes.CDLL:
    """emulation/``name``/emulate.cpp for the kernels of one folder of csrc, ``algorithm``, as a library.

    ``sources`` and ``stand_ins`` are what it sees in the place of csrc, see `_lay_out`; ``options`` are g++'s.
    """
    folder = tmp_path_factory.mktemp(name)
    command = [*_compiler(algorithm, folder), *options]
    # Without these a process keeps one function or variable of a name for all its libraries: of the fake encoders of
    # tensor maps, for one.
    command += ["-shared", "-Wl,-Bsymbolic", "-fno-gnu-unique"]
    _lay_out(folder, sources, stand_ins)
    target = folder / "emulation.so"
    source = EMULATION / name / "emulate.cpp"
    subprocess.run([*command, str(source), "-o", str(target)], check=True, timeout=10 * MINUTE)
    return ctypes.CDLL(str(target))


def hopper_library(
    name: str,
    algorithm: str,
    tmp_path_factory: pytest.TempPathFactory,
    sources: Iterable[str],
    stand_ins: Mapping[str, Iterable[str]],
) -> ctypes.CDLL:
    """A `library` of kernels whose operands TMA brings and wgmma multiplies: C++ for both."""
    sources = ("direct", "block_fusion", "common/activation.cuh", *sources)
    products = [f"downsample_gemm_sm90/{stand_in}" for stand_in in ("sm90.cuh", "sm90_mn_major.cuh", "launch.cuh")]
    stand_ins = {"common": ("ptx.cuh", "cuda_on_cpu.h", *products), **stand_ins}
    return library(name, algorithm, tmp_path_factory, sources, stand_ins, "-O2", "-Dsm90=sm80")


def host_library(source: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """C++ that includes headers of csrc without CUDA, as a library."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("host")
    (folder / "source.cpp").write_text(source)
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", f"-I{CSRC}"]
    subprocess.run(["g++", *flags, "source.cpp", "-o", "host.so"], cwd=folder, check=True, timeout=10 * MINUTE)
    return ctypes.CDLL(str(folder / "host.so"))


def _compiler(algorithm: str, folder: Path) -> list[str]:
    """g++ for sources that find csrc in the folder; skips the test where it or CUDA's headers are missing."""
    locate = [sys.executable, str(KERNELS / "cmake/locate.py"), "nvcc"]
    nvcc = subprocess.run(locate, capture_output=True, text=True).stdout.strip()
    if not shutil.which("g++") or not nvcc:
        pytest.skip("needs g++ and the CUDA headers")
    include = Path(nvcc).parents[1] / "include"
    includes = [f"-I{path}" for path in (folder, EMULATION, include, include / "cccl")]
    return ["g++", "-std=c++17", "-w", "-fPIC", f"-DEMULATED={algorithm}", *includes]


def _lay_out(folder: Path, sources: Iterable[str], stand_ins: Mapping[str, Iterable[str]]) -> None:
    """Copies of folders and files of csrc (patterns), and in the folders named stand-ins, which replace them."""
    for pattern in sources:
        found = list(CSRC.glob(pattern))
        assert found, f"{pattern} is nothing in {CSRC}"
        for source in found:
            target = folder / source.relative_to(CSRC)
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                target.parent.mkdir(exist_ok=True)
                shutil.copy(source, target)
    for part, files in stand_ins.items():
        (folder / part).mkdir(exist_ok=True)
        for file in files:
            shutil.copy(EMULATION / file, folder / part)


def _build(algorithm: str, folder: Path, target: Path) -> None:
    command = [*_compiler(algorithm, folder), "-O1"]
    own = [f"conv_norm_sm90/{stand_in}.cuh" for stand_in in ("again", "grid_sm90", "sm90")]
    common = ("ptx.cuh", "mma_1688.cuh", "half2.cuh", "launch.cuh", "cuda_on_cpu.h", *own)
    parts = ("common", "block_fusion", "mbconv", "patch")
    _lay_out(folder, parts, {"common": common, "patch": ("patch/sync.cuh",)})
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
