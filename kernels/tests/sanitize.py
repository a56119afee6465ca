"""A small matrix of shapes for compute-sanitizer.

``compute-sanitizer --tool memcheck --error-exitcode 1 python kernels/tests/sanitize.py``, and so with racecheck,
initcheck and synccheck. ``--path sm80`` restricts it to one path. Under
PYTORCH_NO_CUDA_MEMORY_CACHING=1, which it sets, every tensor is an allocation
of its own, so that memcheck sees reads past its end.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

sys.path.insert(0, str(Path(__file__).parent))
from cases import inputs, small_cases

import convfirst_kernels as ck
from convfirst_kernels.planner import Device, plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", default="", help="sm80, sm90 or a variant's name; default: what the planner chooses")
    path = parser.parse_args().path
    for case in small_cases():
        chosen = plan(case.problem, Device.of(0), path)["chosen"]
        print(f"{case}: {chosen or 'not covered'}", flush=True)
        if chosen is None:
            continue
        # Made on the CPU: the sanitizer slows every kernel, and only ours are of interest.
        arguments = [a.cuda() if isinstance(a, torch.Tensor) else a for a in inputs(case, 0, device="cpu", guard=0)]
        with ck.force_path(path):
            y = torch.ops.convfirst.conv_first_block(*arguments)
        torch.cuda.synchronize()
        assert y.cpu().isfinite().all(), f"{case}: not finite"


if __name__ == "__main__":
    main()
