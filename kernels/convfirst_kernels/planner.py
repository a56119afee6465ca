"""What the planner decides and why: a window on csrc/block_fusion/plan.cpp, no GPU needed."""

import copy
import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from convfirst_kernels.library import resource_table


@dataclass(frozen=True)
class Problem:
    """One call of the block as the planner sees it."""

    batch: int
    height: int
    width: int
    channels: int
    hidden: int
    kernel_size: int = 3
    group_width: int = 8
    dtype: str = "float16"
    activation: str = "silu"
    has_norm: bool = True


@dataclass(frozen=True)
class MBConvProblem:
    """One call of the MBConv block: 3x3, stride 1."""

    batch: int
    height: int
    width: int
    channels: int
    hidden: int
    group_width: int = 1
    dtype: str = "float16"
    activation: str = "silu"


@dataclass(frozen=True)
class Device:
    """A GPU as the planner sees it."""

    capability: int  # 10 * major + minor
    multiprocessors: int
    max_shared_memory: int  # bytes that a block may opt in to

    @classmethod
    def named(cls, name: str) -> "Device":
        """A known GPU: "a100", "rtx3090", "rtx4090", "l40s", "h100", "h200"; or "cuda", "cuda:1" for one that is here.

        Raises:
            ValueError: the name is neither.
        """
        if name.startswith("cuda"):
            return cls.of(torch.device(name).index or 0)
        if name not in _DEVICES:
            raise ValueError(f"device={name!r} is unknown; accepted: 'cuda', 'cuda:<index>', {', '.join(_DEVICES)}")
        return _DEVICES[name]

    @classmethod
    def of(cls, index: int) -> "Device":
        """The CUDA device of this index."""
        properties = torch.cuda.get_device_properties(index)
        capability = 10 * properties.major + properties.minor
        return cls(capability, properties.multi_processor_count, properties.shared_memory_per_block_optin)


_DEVICES = {
    "a100": Device(80, 108, 166912),
    "rtx3090": Device(86, 82, 101376),
    "rtx4090": Device(89, 128, 101376),
    "l40s": Device(89, 142, 101376),
    "h100": Device(90, 132, 232448),
    "h200": Device(90, 132, 232448),
}


def plan(problem: Problem | MBConvProblem, device: Device, path: str = "") -> dict:
    """The planner's answer: {"problem", "device", "path", "chosen", "candidates"}; see csrc/common/planner.h."""
    p = problem
    shape = p.batch, p.height, p.width, p.channels, p.hidden
    on = device.capability, device.multiprocessors, device.max_shared_memory, path
    if isinstance(problem, MBConvProblem):
        answer = torch.ops.convfirst.plan_mbconv_block(*shape, 3, p.group_width, p.dtype, p.activation, *on)
    else:
        answer = torch.ops.convfirst.plan_conv_first_block(
            *shape, p.kernel_size, p.group_width, p.dtype, p.activation, p.has_norm, *on
        )
    return json.loads(answer)


@contextmanager
def force_path(path: str):
    """Within the context every launch uses this path ("sm80", "sm90") or variant; what it lacks is an error.

    ``$CONVFIRST_KERNELS_PATH`` sets it for a whole process.
    """
    former = torch.ops.convfirst.force_path(path)
    try:
        yield
    finally:
        torch.ops.convfirst.force_path(former)


def explain(
    target: Problem | MBConvProblem | nn.Module,
    device: str | Device = "h100",
    *,
    shape: tuple[int, int, int, int] = (128, 3, 224, 224),
    dtype: str = "float16",
    path: str = "",
) -> str:
    """Which variant runs, its tile, shared memory and registers, and why the others were not chosen. Print it.

    Args:
        target: a problem, or a module: a block or a whole model.
        device: a name that `Device.named` knows, or a `Device`.
        shape: of a module's input, [N, C, H, W].
        dtype: of a module's activations, "float16" or "bfloat16".
        path: restricts the choice, as `force_path` does.
    """
    device = device if isinstance(device, Device) else Device.named(device)
    if isinstance(target, (Problem, MBConvProblem)):
        return _explain_problem(target, device, path)
    problems = problems_of(target, shape, dtype)
    if not problems:
        return f"{type(target).__name__} has no block that a kernel could run"
    parts = [f"{count} x {_explain_problem(problem, device, path)}" for problem, count in problems.items()]
    return "\n".join(parts)


def problems_of(module: nn.Module, shape: tuple[int, int, int, int], dtype: str = "float16") -> Counter[Problem]:
    """The problems that one forward pass of a module on an input of this shape meets, in order, with their counts."""
    from convfirst_kernels.blocks import Unsupported, read_block  # blocks builds on this module

    problems: Counter[Problem] = Counter()

    def note(block, inputs):
        batch, channels, height, width = inputs[0].shape
        parts = read_block(block)
        hidden, group_width = parts.expand.weight.shape[0], parts.conv.in_channels // parts.conv.groups
        side, norm = parts.conv.kernel_size[0], parts.norm is not None
        problems[Problem(batch, height, width, channels, hidden, side, group_width, dtype, parts.activation, norm)] += 1

    module = copy.deepcopy(module).to("meta").eval()
    for block in module.modules():
        block.__dict__.pop("forward", None)
        try:
            if read_block(block) is not None:
                block.register_forward_pre_hook(note)
        except Unsupported:
            continue
    with torch.no_grad():
        module(torch.empty(shape, device="meta", dtype=next(module.parameters()).dtype))
    return problems


def _explain_problem(problem: Problem | MBConvProblem, device: Device, path: str) -> str:
    answer = plan(problem, device, path)
    rows = sorted(answer["candidates"], key=lambda row: (row["name"] != answer["chosen"], bool(row["refusal"])))
    lines = [
        f"{answer['problem']}; compute capability {device.capability}, {device.multiprocessors} multiprocessors,"
        f" {device.max_shared_memory} bytes of shared memory"
    ]
    if answer["chosen"] is None:
        lines.append("  no variant covers it")
    for row in rows:
        if row["name"] == answer["chosen"]:
            lines.append(f"  runs  {row['name']}: {_describe(row, device)}")
        else:
            why = row["refusal"] or f"slower; {_describe(row, device)}"
            lines.append(f"  not   {row['name']}: {why}")
    return "\n".join(lines)


def _describe(row: dict, device: Device) -> str:
    c = row["config"]
    text = (
        f"tile {c['tile_height']}x{c['tile_width']} ({c['tile_pixels']} pixels), hidden chunk {c['hidden_chunk']},"
        f" {c['stages']} stages, {c['grid']} blocks of {c['threads']} threads, {c['shared_memory']} bytes of shared"
        f" memory, {_registers(row['kernel'], device)}, {c['launches']} launch{'es' * (c['launches'] > 1)}"
    )
    workspace = f", {c['workspace']} bytes of workspace" if c["workspace"] else ""
    return f"{text}{workspace}, estimated {row['cost_us']:.1f} us"


def _registers(kernel: str, device: Device) -> str:
    """Registers a thread as ptxas gave them to the machine code that this device runs, or to what there is."""
    compiled = resource_table().get(kernel, {})
    architecture = f"sm_{device.capability}"
    for name in (f"{architecture}a", architecture, *sorted(compiled)):
        if name in compiled:
            return f"{compiled[name]['registers']} registers ({name})"
    return "registers unknown"
