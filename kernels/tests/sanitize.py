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
import mbconv_cases
import patch_cases
from cases import inputs, small_cases

import convfirst_kernels as ck
from convfirst_kernels.direct.convolution import plan_direct
from convfirst_kernels.planner import Device, plan
from convfirst_kernels.winograd import kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", default="", help="sm80, sm90 or a variant's name; default: what the planner chooses")
    path = parser.parse_args().path
    device = Device.of(0)
    for case in small_cases():
        arguments = inputs(case, 0, device="cpu", guard=0)
        chosen = plan(case.problem, device, path)["chosen"]
        run(torch.ops.convfirst.conv_first_block, str(case), chosen, arguments, path)
    for case in mbconv_cases.small_cases():
        arguments = mbconv_cases.mbconv_inputs(case, 0, device="cpu", guard=0)
        chosen = plan(case, device, path)["chosen"]
        run(torch.ops.convfirst.mbconv_block, f"mbconv {case}", chosen, arguments, path)

    for case in patch_cases.small_cases():
        x = patch_cases.patch_inputs(case, 0, device="cpu", guard=0)
        parts, packed = patch_cases.parts_of(patch_cases.module(case, 1), x.dtype)
        weights = [value.cuda() if isinstance(value, torch.Tensor) else value for value in packed]
        print(case, flush=True)
        for one_launch in (False, case.channels in (32, 64)):
            y = patch_cases.run(case, parts, tuple(weights), x.cuda(), one_launch)
            torch.cuda.synchronize()
            assert y.cpu().isfinite().all(), f"{case}: not finite"
        if case.kind == "downsample" and case.channels % 64 == 0 and device.capability == 90 and path != "sm80":
            y = patch_cases.multiply(parts, tuple(weights), x.cuda())
            torch.cuda.synchronize()
            assert y.cpu().isfinite().all(), f"{case} as one product: not finite"
    winograd()
    direct()


def winograd() -> None:
    """Every path, tile and dtype of Winograd's convolution, and the gradients, on shapes that fill no tile."""
    plans = ("fused", "split 32 64 2 64", "split 64 64 1 64", "split 128 64 1 128", "split 128 128 1 128")
    for dtype, algorithm in (
        (torch.float32, "f2"),
        (torch.float32, "f4"),
        (torch.float16, "f2"),
        (torch.bfloat16, "f2"),
    ):
        x, weight, bias = torch.randn(2, 40, 13, 11), torch.randn(70, 40, 3, 3), torch.randn(70).cuda()
        x = x.to("cuda", dtype, memory_format=torch.channels_last)
        weight = weight.to("cuda", dtype)
        for plan_text in plans[dtype != torch.float32 :]:
            print(f"winograd {algorithm} {dtype}: {plan_text}", flush=True)
            y = kernels.forward(x, weight, bias, 1, algorithm, "relu", plan_text)
        gradients = kernels.backward(y, x, weight, bias, 1, algorithm, "relu", [True, True, True])
        torch.cuda.synchronize()
        assert all(t.cpu().isfinite().all() for t in (y, *gradients)), f"winograd {algorithm} {dtype}: not finite"


def direct() -> None:
    """Direct convolution and its gradients, every variant's path, on shapes that fill no tile."""
    for dtype, channels, kernel, stride in (
        (torch.float16, 40, 3, 1),
        (torch.float16, 64, 3, 2),
        (torch.float16, 3, 7, 2),
        (torch.bfloat16, 5, 3, 1),
        (torch.float32, 12, 3, 1),
    ):
        x, weight = torch.randn(2, channels, 13, 11), torch.randn(72, channels, kernel, kernel)
        x, weight = (t.to("cuda", dtype, memory_format=torch.channels_last) for t in (x, weight))
        geometry, bias = (stride, stride, 1, 1, 1, 1), torch.randn(72).cuda()
        for path in ("", "sm80"):
            print(f"direct {dtype} {channels} channels, {kernel}x{kernel}, stride {stride}, path {path!r}", flush=True)
            with ck.force_path(path):
                y = torch.ops.convfirst.direct_conv2d(x, weight, bias, *geometry, "relu")
                dx = torch.ops.convfirst.direct_conv2d_dgrad(y, weight, 13, 11, *geometry)
                dw = torch.ops.convfirst.direct_conv2d_wgrad(y, x, kernel, kernel, *geometry)
            torch.cuda.synchronize()
            assert all(t.cpu().isfinite().all() for t in (y, dx, dw)), f"direct {dtype} {channels}: not finite"
    few_pixels()


def few_pixels() -> None:
    """Direct convolution by the variants that the planner takes for few pixels, for 64 channels and for RGB."""
    for channels, path in (
        (3, "sm90_few_taps"),
        (64, "sm90_resident_halo"),
        (128, "sm90_halo_128x128"),
        (256, "sm90_halo_128x64x4"),
        (128, "sm90_split_128x128x2"),
        (104, "sm90_split_128x64x4"),
    ):
        shape, weight_shape = (2, channels, 13, 11), (96, channels, 3, 3)
        if plan_direct(shape, weight_shape, padding=1, device="cuda", path=path)["chosen"] is None:
            continue
        x, weight = (
            torch.randn(s).to("cuda", torch.float16, memory_format=torch.channels_last) for s in (shape, weight_shape)
        )
        print(f"direct {path}, {channels} channels", flush=True)
        with ck.force_path(path):
            y = torch.ops.convfirst.direct_conv2d(x, weight, None, 1, 1, 1, 1, 1, 1, "relu")
        torch.cuda.synchronize()
        assert y.cpu().isfinite().all(), f"{path}: not finite"


def run(operator, name: str, chosen: str | None, arguments: tuple, path: str) -> None:
    """Arguments come from the CPU: the sanitizer slows every kernel, and only ours are of interest."""
    print(f"{name}: {chosen or 'not covered'}", flush=True)
    if chosen is None:
        return
    moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    with ck.force_path(path):
        y = operator(*moved)
    torch.cuda.synchronize()
    assert y.cpu().isfinite().all(), f"{name}: not finite"


if __name__ == "__main__":
    main()
