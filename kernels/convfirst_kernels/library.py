"""Finds and loads libconvfirst_kernels.so, which registers the operators ``torch.ops.convfirst.*``."""

import json
import os
from functools import cache
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent


def library_path() -> Path:
    """The compiled library: ``$CONVFIRST_KERNELS_LIBRARY``, else the one installed beside this file.

    Raises:
        ImportError: there is none.
    """
    path = Path(os.environ.get("CONVFIRST_KERNELS_LIBRARY", _FOLDER / "libconvfirst_kernels.so"))
    if not path.exists():
        raise ImportError(f"convfirst_kernels: {path} does not exist; build the package with `pip install ./kernels`")
    return path


@cache
def resource_table() -> dict[str, dict[str, dict[str, int]]]:
    """What ptxas reported at build time: {mangled kernel: {architecture: {registers, spill_stores, ...}}}."""
    path = library_path().with_name("ptxas.json")
    return json.loads(path.read_text()) if path.exists() else {}


torch.ops.load_library(library_path())
