"""A small matrix of shapes for compute-sanitizer.

``compute-sanitizer --tool memcheck --error-exitcode 1 python kernels/tests/sanitize.py``, and so with racecheck,
initcheck and synccheck; ``python scripts/sanitize.py`` runs every tool over every part at once and records the result.
``--part`` runs some parts alone, ``--path sm80`` restricts the kernels to one path. Under
PYTORCH_NO_CUDA_MEMORY_CACHING=1, which it sets, every tensor is an allocation of its own, so that memcheck sees reads
past its end.

``--kernel-name kns=convfirst`` among compute-sanitizer's options restricts a tool to this package's kernels, all of
which are in the namespace convfirst: the products of cuBLAS between them are slow to check and not ours to mend. Not
for initcheck, which would then take what a kernel of PyTorch wrote for uninitialised. It does so with what bulk copies
(TMA) write in any case: its reports on the Hopper kernels of ``blocks`` and on both backward parts say nothing.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import mbconv_cases
import patch_cases
from cases import Case, backward_small_cases, inputs, small_cases

import convfirst_kernels as ck
from convfirst_kernels import backward, feed_forward_backward, kept
from convfirst_kernels import stages as stage
from convfirst_kernels.block import BlockWeights
from convfirst_kernels.direct.convolution import plan_direct
from convfirst_kernels.planner import Device, Problem, plan
from convfirst_kernels.winograd import kernels

operators = torch.ops.convfirst
Run = tuple[str, Callable[[], tuple[Tensor, ...]]]  # what it is, and what gives tensors that must be finite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", default=list(PARTS), choices=list(PARTS), help="default: all")
    parser.add_argument("--path", default="", help="sm80, sm90 or a variant's name; default: what the planner chooses")
    options = parser.parse_args()
    start = time.monotonic()
    for part in options.part:
        for name, run in PARTS[part](options.path):
            print(f"{time.monotonic() - start:6.1f} s  {part} {name}", flush=True)
            results = run()
            torch.cuda.synchronize()
            assert all(result.cpu().isfinite().all() for result in results), f"{part} {name}: not finite"
    print(f"{time.monotonic() - start:6.1f} s  done", flush=True)


def blocks(path: str) -> Iterator[Run]:
    """The conv-first block, forward."""
    for case in small_cases():
        arguments = inputs(case, 0, device="cpu", guard=0)
        yield from planned(operators.conv_first_block, str(case), case.problem, arguments, path)


def mbconv(path: str) -> Iterator[Run]:
    """The MBConv block, forward."""
    for case in mbconv_cases.small_cases():
        arguments = mbconv_cases.mbconv_inputs(case, 0, device="cpu", guard=0)
        yield from planned(operators.mbconv_block, str(case), case, arguments, path)


def planned(operator, name: str, problem, arguments: tuple, path: str) -> Iterator[Run]:
    chosen = plan(problem, Device.of(0), path)["chosen"]
    if chosen is not None:
        yield f"{name}: {chosen}", partial(forced, path, operator, *moved(arguments))


def moved(arguments: tuple) -> list:
    """Arguments come from the CPU: the sanitizer slows every kernel, and only ours are of interest."""
    return [a.cuda() if isinstance(a, Tensor) else a for a in arguments]


def forced(path: str, function: Callable, *arguments) -> tuple[Tensor, ...]:
    with ck.force_path(path):
        results = function(*arguments)
    return results if isinstance(results, tuple) else (results,)


def block_backward(path: str) -> Iterator[Run]:
    """All gradients of the block, beside the forward that keeps the normalised convolution for them."""
    if path == "sm80":
        return
    for case, grad, arguments, mask in backward_arguments():
        if case.problem.channels <= feed_forward_backward.SM90_CHANNELS:
            yield f"{case}, kept", partial(kept_and_backward, grad, arguments, mask)
            yield f"{case}, recomputed", partial(operators.conv_first_block_backward, grad, *arguments, mask)


def chunked_backward(path: str) -> Iterator[Run]:
    """The same where the feed-forward half is products over chunks of pixels, with portable kernels between them.

    That is what blocks of more than 256 channels take; here the narrower ones do too.
    """
    chunked = backward.stages()._replace(feed_forward_backward=feed_forward_backward._chunked)
    for case, grad, arguments, mask in backward_arguments():
        yield str(case), partial(backward.staged_backward, chunked, grad, *arguments, mask)


def backward_arguments() -> Iterator[tuple[Case, Tensor, list, list[bool]]]:
    """Cases that the device has kernels for; the mask leaves out drop path's factors, whose gradient is PyTorch's."""
    for case in backward_small_cases():
        arguments = moved(inputs(case, 0, device="cpu", guard=0))
        if backward.refusal_of(arguments) is None:
            grad = image(*arguments[0].shape).to(arguments[0].dtype).cuda()
            yield case, grad, arguments, [i < kept.TENSORS - 1 for i in range(kept.TENSORS)]


def kept_and_backward(grad: Tensor, arguments: list, mask: list[bool]) -> tuple[Tensor, ...]:
    y, a, rstd = operators.conv_first_block_kept(*arguments)
    return y, a, *operators.conv_first_block_kept_backward(grad, a, rstd, *arguments, mask)


def stages(path: str) -> Iterator[Run]:
    """A stage of ConvFirst in one launch, with and without the downsampling that begins it."""
    if path == "sm80":
        return
    for channels, count, begins in ((64, 3, False), (128, 3, False), (256, 2, False), (256, 2, True), (512, 2, True)):
        if stage.refusal(1, 5, 7, channels, count, "float16", "silu", 0):
            continue
        case = Case(Problem(1, 5, 7, channels, 4 * channels, 3, 8, "float16", "silu", True), False, False, False)
        drawn = [moved(inputs(case, seed, device="cpu", guard=0)) for seed in range(count)]
        weights = stage.pack_stage([BlockWeights(*block[1:10], *block[12:]) for block in drawn])
        x, down = drawn[0][0], None
        if begins:
            half = channels // 2
            x = torch.randn(1, half, 10, 14).half().contiguous(memory_format=torch.channels_last).cuda()
            matrix = (torch.randn(channels, 4 * half) * (4 * half) ** -0.5).half()
            down = stage.pack_down(matrix.cuda(), torch.randn(channels).cuda(), 1e-6, True)
        name = f"{channels} channels, {count} blocks{' after downsampling' if begins else ''}"
        yield name, partial(run_stage, x, weights, down)


def run_stage(x: Tensor, weights, down) -> tuple[Tensor, ...]:
    workspace = stage.workspace(x.device)
    return tuple(stage.run_stage(x, weights, down, workspace) for _ in range(2))


def patches(path: str) -> Iterator[Run]:
    """Stems and downsampling layers."""
    on_hopper = Device.of(0).capability == 90 and path != "sm80"
    for case in patch_cases.small_cases():
        x = patch_cases.patch_inputs(case, 0, device="cpu", guard=0)
        parts, packed = patch_cases.parts_of(patch_cases.module(case, 1), x.dtype)
        weights = tuple(moved(packed))
        for one_launch in (False, case.channels in (32, 64)):
            name = f"{case}{' in one launch' if one_launch else ''}"
            yield name, partial(one, patch_cases.run, case, parts, weights, x.cuda(), one_launch)
        if case.kind == "downsample" and case.channels % 64 == 0 and on_hopper:
            yield f"{case} as one product", partial(one, patch_cases.multiply, parts, weights, x.cuda())


def one(function: Callable[..., Tensor], *arguments) -> tuple[Tensor]:
    return (function(*arguments),)


def winograd(path: str) -> Iterator[Run]:
    """Every path, tile and dtype of Winograd's convolution, and the gradients, on shapes that fill no tile."""
    plans = ("fused", "split 32 64 2 64", "split 64 64 1 64", "split 128 64 1 128", "split 128 128 1 128")
    for dtype, algorithm in (
        (torch.float32, "f2"),
        (torch.float32, "f4"),
        (torch.float16, "f2"),
        (torch.bfloat16, "f2"),
    ):
        x, weight = image(2, 40, 13, 11).to(dtype), torch.randn(70, 40, 3, 3).to(dtype)
        x, weight, bias = moved((x, weight, torch.randn(70)))
        for plan_text in plans[dtype != torch.float32 :]:
            arguments = (x, weight, bias, 1, algorithm, "relu", plan_text)
            yield f"{algorithm} {dtype}: {plan_text}", partial(one, kernels.forward, *arguments)
        yield f"{algorithm} {dtype}: gradients", partial(winograd_gradients, *arguments)
    if torch.cuda.get_device_capability() != (9, 0):
        return
    for channels in (40, 168):  # filters that stay in shared memory, and a ring of slots
        x, weight = image(2, channels, 13, 11).half(), torch.randn(72, channels, 3, 3).half()
        arguments = (*moved((x, weight, torch.randn(72))), 1, "f2", "relu", "fused")
        yield f"f2 {channels} channels: fused on Hopper", partial(one, kernels.forward, *arguments)


def winograd_gradients(x: Tensor, weight: Tensor, bias: Tensor, *options) -> tuple[Tensor, ...]:
    y = kernels.forward(x, weight, bias, *options)
    return kernels.backward(y, x, weight, bias, *options[:-1], [True, True, True])  # which has plans of its own


def image(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def direct(path: str) -> Iterator[Run]:
    """Direct convolution and its gradients, every variant's path, on shapes that fill no tile."""
    for dtype, channels, side, stride in (
        (torch.float16, 40, 3, 1),
        (torch.float16, 64, 3, 2),
        (torch.float16, 3, 7, 2),
        (torch.bfloat16, 5, 3, 1),
        (torch.float32, 12, 3, 1),
    ):
        weight = torch.randn(72, channels, side, side).contiguous(memory_format=torch.channels_last)
        x, weight, bias = moved((image(2, channels, 13, 11).to(dtype), weight.to(dtype), torch.randn(72)))
        for chosen in ("sm80",) if path == "sm80" else ("", "sm80"):
            name = f"{dtype} {channels} channels, {side}x{side}, stride {stride}, path {chosen!r}"
            yield name, partial(forced, chosen, direct_and_gradients, x, weight, bias, side, stride)


def direct_and_gradients(x: Tensor, weight: Tensor, bias: Tensor, side: int, stride: int) -> tuple[Tensor, ...]:
    geometry = (stride, stride, 1, 1, 1, 1)
    y = operators.direct_conv2d(x, weight, bias, *geometry, "relu")
    dx = operators.direct_conv2d_dgrad(y, weight, 13, 11, *geometry)
    return y, dx, operators.direct_conv2d_wgrad(y, x, side, side, *geometry)


def few_pixels(path: str) -> Iterator[Run]:
    """Direct convolution by the variants that the planner takes for few pixels, for 64 channels and for RGB."""
    if path == "sm80":
        return
    for channels, variant in (
        (3, "sm90_few_taps"),
        (64, "sm90_resident_halo"),
        (128, "sm90_halo_128x128"),
        (256, "sm90_halo_128x64x4"),
        (128, "sm90_split_128x128x2"),
        (104, "sm90_split_128x64x4"),
    ):
        shape, weight_shape = (2, channels, 13, 11), (96, channels, 3, 3)
        if plan_direct(shape, weight_shape, padding=1, device="cuda", path=variant)["chosen"] is None:
            continue
        x, weight = moved([image(*s).half() for s in (shape, weight_shape)])
        arguments = (x, weight, None, 1, 1, 1, 1, 1, 1, "relu")
        yield f"{variant}, {channels} channels", partial(forced, variant, operators.direct_conv2d, *arguments)


# What --part may name.
PARTS: dict[str, Callable[[str], Iterator[Run]]] = {
    "blocks": blocks,
    "backward": block_backward,
    "chunked_backward": chunked_backward,
    "stages": stages,
    "mbconv": mbconv,
    "patches": patches,
    "winograd": winograd,
    "direct": direct,
    "few_pixels": few_pixels,
}

if __name__ == "__main__":
    main()
