"""spio's convolution in groups of 8 (https://pypi.org/project/spio), on GPUs and installations that it runs on.

spio 0.8 names compute capabilities 8.0, 8.6 and 8.9 as supported; elsewhere the model that picks a kernel's
configuration refuses. Its kernels are compiled for the GPU at hand by NVRTC, which need not refuse: there all
configurations are tried here, and the fastest whose result is right counts. It looks for NVRTC where CUDA 12's
packages on PyPI have it.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

LAUNCHES = 60
SPIN = 6_000_000  # clocks of a kernel that keeps the GPU busy while launches queue up


def prepare_spio(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Callable[[], tuple[float | None, str]]:
    """Compile ``conv2d(x, weight, bias, padding=1, groups=C // 8)``; what comes back times it.

    Args:
        inputs: [N, C, H, W] each, channels_last; the calls take them in turn.
        weight: [C, 8, 3, 3], channels_last; bias: [C], float32.

    Returns:
        A function that gives milliseconds of a call and how it ran, or None and why it didn't.
    """
    if weight.dtype != torch.float16:
        return lambda: (None, f"not run: spio has no {weight.dtype}")
    spio, reason = _imported()
    if spio is None:
        return lambda: (None, f"not run: {reason}")
    major, minor = torch.cuda.get_device_capability()
    supported = f"sm_{major}{minor}" in spio.supported_arch
    try:
        kernels = _kernels(inputs[0], weight, bias, supported)
    except Exception as error:  # its own errors, NVRTC's, and the network's, from which it takes its models
        reason = f"not run: {type(error).__name__}: {error}"
        return lambda: (None, reason)
    return lambda: _fastest(spio, kernels, supported, inputs, weight, bias)


def _fastest(spio, kernels: list, supported: bool, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor) -> tuple:
    times = [ms for ms in (_time(kernel, inputs, weight, bias) for kernel in kernels) if ms is not None]
    if not times:
        return None, f"not run: no result of {len(kernels)} configurations is right here"
    if supported:
        return min(times), f"spio {spio.__version__}, the configuration of its own model"
    names = ", ".join(spio.supported_arch)
    return min(times), f"spio {spio.__version__}, the fastest of {len(times)} configurations; it supports {names}"


@cache
def _imported() -> tuple:
    """spio, or None and why it can't be imported."""
    os.environ.setdefault("SPIO_WORKERS", str(os.cpu_count()))
    try:
        import spio
        import spio.kernels
    except Exception as error:  # not installed, another Python, no NVRTC where it looks
        return None, f"{type(error).__name__}: {error}"
    return spio, ""


def _kernels(x: Tensor, weight: Tensor, bias: Tensor, supported: bool) -> list:
    """spio's choice of configuration where it makes one, else every configuration, compiled and loaded."""
    from spio.compiler import compile_kernel_configs
    from spio.cuda.driver import get_device_attributes
    from spio.kernels import Conv2dGw8Params, conv2d_gw8_kernel_factory

    params = Conv2dGw8Params.from_tensors(x, weight, bias, (1, 1))
    if supported:
        return [conv2d_gw8_kernel_factory.get_kernel(params, x.device)]
    attributes = get_device_attributes(x.device.index)
    configurations = list(conv2d_gw8_kernel_factory.configs(params, attributes))
    kernels = compile_kernel_configs(conv2d_gw8_kernel_factory, params, configurations, attributes)
    for kernel in kernels:
        kernel.load(device_ordinal=x.device.index)
    return kernels


def _time(kernel, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor) -> float | None:
    """Milliseconds of a launch, None where the result is wrong or the launch refused."""
    y, launch = torch.full_like(inputs[0], float("nan")), kernel.kernel_spec.launch_params

    def call(x: Tensor) -> None:
        kernel.function.launch(launch.grid, launch.block, [y, x, weight, bias], launch.shared_mem_bytes)

    try:
        call(inputs[0])
        torch.cuda.synchronize()
    except Exception:  # more shared memory or threads than this GPU gives
        return None
    expected = F.conv2d(inputs[0].float(), weight.float(), bias, padding=1, groups=len(bias) // 8)
    if not (y.float() - expected).abs().max() <= 0.01 * expected.abs().max():
        return None
    return _queued_ms(call, inputs)


def _queued_ms(call: Callable[[Tensor], None], inputs: Sequence[Tensor]) -> float:
    """Milliseconds of a launch among many: spio launches on the default stream, which no CUDA graph captures."""
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SPIN)
        start.record()
        for i in range(LAUNCHES):
            call(inputs[i % len(inputs)])
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / LAUNCHES)
    return sorted(times)[1]
