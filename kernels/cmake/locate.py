"""Prints where the build finds one of its requirements: ``python locate.py torch|cutlass|nvcc``."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def package_folder(name: str) -> Path | None:
    spec = find_spec(name)
    return Path(list(spec.submodule_search_locations)[0]) if spec else None


def torch() -> Path:
    folder = package_folder("torch")
    if folder is None:
        sys.exit("convfirst_kernels: the build needs torch >= 2.11 in its Python environment")
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        sys.exit(f"convfirst_kernels: {folder} has no stable ABI headers; torch >= 2.11 is needed")
    return folder


def cutlass() -> Path:
    folder = package_folder("cutlass_library")
    include = folder / "source/include" if folder else None
    if include is None or not (include / "cute/tensor.hpp").exists():
        sys.exit("convfirst_kernels: the build needs the CUTLASS headers: pip install nvidia-cutlass==4.2.0.0")
    return include


def pypi_nvcc() -> Path | None:
    spec = find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else []
    found = [Path(folder) / "cu13/bin/nvcc" for folder in folders if (Path(folder) / "cu13/bin/nvcc").exists()]
    return found[0] if found else None


def system_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin/nvcc").exists():
        return Path(home) / "bin/nvcc"
    on_path = shutil.which("nvcc")
    return real_nvcc(on_path) if on_path else None


def real_nvcc(command: str) -> Path:
    """The nvcc inside its toolkit: what PATH names may be a wrapper elsewhere."""
    said = subprocess.run([command, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return Path(top[1].strip()).resolve() / "bin/nvcc" if top else Path(command).resolve()


def nvcc() -> Path:
    choice = os.environ.get("CONVFIRST_KERNELS_CUDA", "")
    sources = {"pypi": [pypi_nvcc], "system": [system_nvcc], "": [pypi_nvcc, system_nvcc]}
    if choice not in sources:
        sys.exit(f"convfirst_kernels: CONVFIRST_KERNELS_CUDA={choice!r}; it is 'pypi', 'system' or unset")
    found = next((path for path in (source() for source in sources[choice]) if path), None)
    if found is None:
        sys.exit(
            "convfirst_kernels: no nvcc found: pip install nvidia-cuda-nvcc==13.0.88 (with nvidia-nvvm, nvidia-cuda-crt"
            ", nvidia-cuda-runtime, nvidia-cuda-cccl of CUDA 13.0), or set CUDA_HOME and CONVFIRST_KERNELS_CUDA=system"
        )
    return found


if __name__ == "__main__":
    print({"torch": torch, "cutlass": cutlass, "nvcc": nvcc}[sys.argv[1]]())
