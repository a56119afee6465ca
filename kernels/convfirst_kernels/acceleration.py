"""Swaps a model's residual blocks for fused ones, in place, and back."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from convfirst_kernels import backward, batch_norms, kept, outside, outside_training, stages
from convfirst_kernels import block as fused
from convfirst_kernels.blocks import Parts, Unsupported, check_hooks, read_block
from convfirst_kernels.winograd.runs import RunsForward, find_runs
from convfirst_kernels.winograd.swap import WinogradForward, find_convolutions

launch = torch.ops.convfirst.conv_first_block
launch_kept = torch.ops.convfirst.conv_first_block_kept
CHOICES = (*fused.KERNELS, "reference")
_log = logging.getLogger("convfirst_kernels")


class FusedForward:
    """Stands in for a block's ``forward``: one launch where a kernel covers the call, the block's own code elsewhere.

    It lives in the block's ``__dict__``, where an attribute of that name hides the class's method; the block's modules,
    parameters and state_dict stay as they are. Packed weights are kept until a parameter or buffer changes.
    """

    reader = staticmethod(read_block)

    def __init__(self, block: nn.Module, kernels: str, frozen: bool):
        self.block = block
        self.kernels = kernels
        self.frozen = frozen
        self.packed: tuple | None = None
        self.packed_for: tuple[torch.dtype, torch.device] | None = None
        self.key: tuple | None = None
        self.parts: Parts | outside.OutsideParts | None = None

    def __call__(self, x: Tensor) -> Tensor:
        block = self.block
        try:
            parts = self.read()
            reason = refusal(parts, x.device, fused.compute_dtype(x), self.kernels)
            if reason is None and self.kernels == "auto" and _asks_for_gradient(x, *parts.tensors()):
                reason = _backward_refusal(parts, x.device, fused.compute_dtype(x))
        except Unsupported as changed:
            parts, reason = None, str(changed)
        if reason is not None:
            if self.kernels == "required":
                raise RuntimeError(f"{type(block).__name__}: kernels='required', but {reason}")
            fused.log_once(f"{type(block).__name__} runs its own PyTorch code: {reason}")
            return type(block).forward(block, x)
        if batch_norms.needs_statistics(parts):
            return batch_norms.forward(parts, x.to(fused.compute_dtype(x)), sample_scale(parts.drop_path, x))
        weights = self.weights(parts, fused.compute_dtype(x), x.device)
        x = x.contiguous(memory_format=torch.channels_last)
        arguments = fused.operator_arguments(x, weights, sample_scale(parts.drop_path, x))
        fused.check_backward(type(block).__name__, arguments, self.kernels)
        if _asks_for_gradient(x, *parts.tensors()) and kept.keeps(arguments, self.kernels):
            return launch_kept(*arguments)[0]
        return launch(*arguments)

    def read(self) -> Parts:
        """The block's parts; modules may be replaced, by converting batch norms for instance, unless it is frozen."""
        if not self.frozen or torch.compiler.is_compiling():
            return self.reader(self.block)
        if self.parts is None:
            self.parts = self.reader(self.block)
        return self.parts

    def weights(self, parts: Parts | outside.OutsideParts, dtype: torch.dtype, device: torch.device) -> tuple:
        """Packed afresh, differentiably, where a gradient may be asked for; otherwise kept while they hold good."""
        tensors = parts.tensors()
        if _asks_for_gradient(*tensors):
            self.packed = None  # an update is near, and fused optimisers leave version counters alone
            return parts.pack(dtype)
        kept = self.packed
        fits = kept is not None and self.packed_for == (dtype, device)
        if torch.compiler.is_compiling():
            # A traced program can't look at version counters: only weights declared frozen outlive its calls.
            return kept if fits and self.frozen else parts.pack(dtype, absorb=True)
        key = None if self.frozen else tuple(fused.state_of(tensor) for tensor in tensors)
        if fits and key == self.key:
            return kept
        with torch.inference_mode(False), torch.no_grad():
            packed = parts.pack(dtype, absorb=True)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():  # a captured packing has not run yet
            self.packed, self.packed_for, self.key = packed, (dtype, device), key
        return packed

    def forget(self) -> None:
        self.packed = None

    def prepare(self, parts: Parts | outside.OutsideParts) -> None:
        """Pack now what a 16-bit model on a GPU will need, so that no later stream finds a packing in progress."""
        weight = parts.conv.weight
        if weight.device.type == "cuda" and weight.dtype in (torch.float16, torch.bfloat16):
            with torch.no_grad():
                self.weights(parts, weight.dtype, weight.device)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "packed": None, "packed_for": None, "key": None, "parts": None}


class OutsideForward(FusedForward):
    """Stands in for the ``forward`` of a stem or downsampling layer: kernels, or products where it is trained.

    Residual blocks are what kernels="required" requires: elsewhere this runs the layer's own code.
    """

    reader = staticmethod(outside.read_outside)

    def __call__(self, x: Tensor) -> Tensor:
        layer, dtype = self.block, fused.compute_dtype(x)
        try:
            parts = self.read()
            if _asks_for_gradient(x, *parts.tensors()):
                reason = outside_training.refusal(parts, x, dtype, self.kernels)
                if reason is None:
                    return outside_training.forward(parts, x.to(dtype))
            else:
                reason = outside.refusal(parts, x, dtype)
        except Unsupported as changed:
            reason = str(changed)
        if reason is not None:
            if not layer.training:  # where it trains, that is as it should be
                fused.log_once(f"{type(layer).__name__} runs its own PyTorch code: {reason}")
            return type(layer).forward(layer, x)
        return parts.launch(x.to(dtype), self.weights(parts, dtype, x.device))


class HeadForward(OutsideForward):
    """Stands in for the ``forward`` of a classifier's head, for few images; more of them run its own code."""

    reader = staticmethod(outside.read_head)

    def __call__(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits or self.block.training or x.shape[0] > outside.HEAD_IMAGES:
            return type(self.block).forward(self.block, x, pre_logits)
        return super().__call__(x)


class StageForward:
    """Stands in for the ``forward`` of a frozen stage: downsampling and blocks in one launch where that covers it.

    It takes over the blocks' packed weights, stacked; the blocks keep views of them.
    """

    def __init__(self, stage: nn.Module):
        self.stage = stage
        self.weights: stages.StageWeights | None = None
        self.down: stages.DownWeights | None = None
        self.workspace: Tensor | None = None
        self._pack()

    def _pack(self) -> None:
        forwards = [block.__dict__["forward"] for block in self.stage.blocks]
        packed = [forward.packed for forward in forwards]
        if any(weights is None for weights in packed):
            return
        with torch.no_grad():
            weights = stages.pack_stage(packed)
        if weights is None:
            return
        before = self.stage.downsample.__dict__.get("forward")
        if isinstance(before, OutsideForward) and before.packed is not None:
            weight, bias, _, eps, has_norm, _ = before.packed
            channels = weights.conv_weight.shape[2]
            if channels >= stages.DOWN_CHANNELS and weight.shape == (channels, 2 * channels):
                self.down = stages.pack_down(weight, bias, eps, has_norm)
        self.weights, self.workspace = weights, stages.workspace(weights.conv_weight.device)
        for forward, own in zip(forwards, stages.unpack_stage(weights), strict=True):
            scaled = forward.packed.layer_scale is not None  # a factor of one would cost the blocks' kernels time
            forward.packed = own if scaled else own._replace(layer_scale=None)

    def __call__(self, x: Tensor) -> Tensor:
        down = self.down
        if down is not None and self.covers(x, 2):
            return stages.run_stage(x, self.weights, down, self.workspace)
        if down is None and self.weights is not None:
            x = self.stage.downsample(x)
            if self.covers(x, 1):
                return stages.run_stage(x, self.weights, None, self.workspace)
            return self.stage.blocks(x)
        return type(self.stage).forward(self.stage, x)

    def covers(self, x: Tensor, halved: int) -> bool:
        """Whether one launch takes x, which a downsampling halves by ``halved``."""
        weights = self.weights
        if torch.is_grad_enabled() or self.stage.training or any(block.training for block in self.stage.blocks):
            return False
        dtype = weights.conv_weight.dtype
        if x.dtype != dtype or fused.compute_dtype(x) != dtype or x.device != weights.conv_weight.device:
            return False
        n, _, height, width = x.shape
        count, _, channels, _ = weights.conv_weight.shape
        name = "float16" if dtype == torch.float16 else "bfloat16"
        problem = n, height // halved, width // halved, channels, count, name, weights.activation
        return not stages.refusal(*problem, x.device.index or 0)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "weights": None, "down": None, "workspace": None}


def forget(model: nn.Module) -> None:
    """Drop the packed weights that `accelerate` keeps, where weights changed unseen: sharded ones, for instance."""
    for module in model.modules():
        stand_in = module.__dict__.get("forward")
        if isinstance(stand_in, FusedForward | WinogradForward) and not stand_in.frozen:
            stand_in.forget()


def _asks_for_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def sample_scale(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """Drop path's factor for each sample, [N] float32, or None where it drops nothing (timm's DropPath)."""
    rate = getattr(drop_path, "drop_prob", 0.0) or 0.0
    if rate == 0.0 or not drop_path.training:
        return None
    keep = 1.0 - rate
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device).bernoulli_(keep)
    return scale / keep if keep > 0.0 and getattr(drop_path, "scale_by_keep", True) else scale


def refusal(parts: Parts, device: torch.device, dtype: torch.dtype, kernels: str = "auto") -> str | None:
    """Why no kernel computes this block on a tensor of this device and dtype, or None where one does."""
    if kernels == "reference":
        reason = None if device.type == "cpu" else f"kernels='reference' computes on a CPU, and x is on {device}"
    else:
        conv = parts.conv
        reason = fused.refusal(
            device, dtype, conv.in_channels, parts.expand.weight.shape[0], conv.kernel_size[0],
            conv.in_channels // conv.groups, parts.activation, parts.norm is not None,
        )  # fmt: skip
    if reason is None and batch_norms.needs_statistics(parts):
        reason = batch_norms.refusal(parts, device, dtype, kernels)
    return reason


@dataclass
class Row:
    """What became of one block."""

    name: str
    block: str  # its class
    detail: str  # its shape where it was swapped, else why not
    swapped: bool


@dataclass
class Report:
    """What `accelerate` did; printable, and able to undo it."""

    rows: list[Row]  # residual blocks
    kernels: str
    outside: list[Row] = field(default_factory=list)  # stems and downsampling layers
    heads: list[Row] = field(default_factory=list)
    convolutions: list[Row] = field(default_factory=list)  # 3x3, stride 1, outside of all those
    note: str = ""  # what the rows leave open
    _blocks: list[nn.Module] = field(default_factory=list, repr=False)

    @property
    def swapped(self) -> list[Row]:
        return [row for row in self.rows if row.swapped]

    @property
    def skipped(self) -> list[Row]:
        return [row for row in self.rows if not row.swapped]

    def undo(self) -> None:
        """Give every swapped block and layer its own ``forward`` back."""
        for block in self._blocks:
            _restore(block)
        self._blocks.clear()

    def __str__(self) -> str:
        others = self.outside + self.heads + self.convolutions
        width = max((len(row.name) for row in self.rows + others), default=0)
        lines = [f"{len(self.swapped)} of {len(self.rows)} blocks fused (kernels={self.kernels!r})"]
        if self.convolutions:
            count = f"{sum(row.swapped for row in self.convolutions)} of {len(self.convolutions)}"
            lines[0] += f", {count} 3x3 convolutions on kernels in calls measured to be faster"
        lines += [self.note] if self.note else []
        for row in self.rows + others:
            state = "as it was" if not row.swapped else "on kernels" if row in self.convolutions else "fused"
            lines.append(f"  {row.name:{width}}  {state}  {row.block}: {row.detail}")
        return "\n".join(lines)


def accelerate(
    model: nn.Module,
    kernels: str = "auto",
    frozen: bool = False,
    winograd: bool = True,
    whole_stages: bool = False,
) -> Report:
    """Make the residual blocks of ConvFirst and of timm's ConvNeXt run as fused kernels, in place.

    So do, in inference, their stems, downsampling layers and, for few images, heads; where a gradient may be asked
    for, stems and downsampling layers become products of patches in PyTorch's operators, made for torch.compile.
    Parameters, buffers, state_dict, hooks on blocks, training, deepcopy and pickle stay as they were. Batch norms fold
    in evaluation mode; in training mode such blocks run as the stages of `batch_norms`, synchronised ones by their own
    code. Put the model in channels_last: a fused block converts its input otherwise. A CUDA graph reads the packed
    weights of when it was captured: capture it again after weights change. torch.jit.script and nn.DataParallel don't
    follow what stands in for a ``forward``.

    Args:
        model: any module that contains such blocks.
        kernels: "auto" leaves alone what no kernel covers, block by block and call by call, and logs that once; where a
            gradient may be asked for, no kernel covers a call unless its gradients have one too. "required" raises
            instead, for residual blocks; "off" takes fused forwards away again; "reference" lets the operators compute
            on a CPU, in PyTorch and any floating dtype, to test what surrounds them without a GPU.
        frozen: the weights will not change: pack them once and never look again. Under torch.compile it keeps the
            packing out of the compiled program.
        winograd: also let dense 3x3 convolutions of stride 1 elsewhere in the model, as VGG's and ResNet's, run in
            inference as Winograd's in float32 without TF32 and as direct convolution in 16 bits, in calls of a size
            where that was measured to be faster than cuDNN: channels_last, compute capability 9.0. F(4x4, 3x3) in
            float32 rounds more than cuDNN does: `winograd.convolution.F4_BOUND`. Frozen and in evaluation mode, in
            nn.Sequential and the blocks of timm's and torchvision's ResNet, the batch norm and the activation that
            follow such a convolution are part of its kernel.
        whole_stages: also run a stage of a frozen ConvFirst, its downsampling and its blocks, in one launch where its
            tiles of 32 pixels fit the device all at once: one image of 224 pixels, or several small ones. The launch's
            thread blocks wait for one another, so two such launches must never run at once on a device, as they might
            on two streams: they could wait for ever. `compile_for_inference` keeps its calls apart.

    Returns:
        A report of every block and layer that was found: swapped or not, and why.

    Raises:
        ValueError: ``kernels`` is none of those.
        RuntimeError: "required" and something is not covered; the message lists all of it, and the model is unchanged.
    """
    if kernels not in CHOICES:
        raise ValueError(f"kernels={kernels!r}; accepted: {', '.join(map(repr, CHOICES))}")
    found = [(name, module, *_examine(module)) for name, module in model.named_modules()]
    found = [entry for entry in found if entry[2] is not None or entry[3] is not None]
    layers = [(name, module, *_examine_outside(module)) for name, module in outside.find_outside(model)]
    heads = [(name, head, *_examine_outside(head, outside.read_head)) for name, head in outside.find_heads(model)]
    found_stages = _find_stages(model)
    taken = [name for name, *_ in found + layers]
    convolutions = find_convolutions(model, taken)
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), WinogradForward | RunsForward):
            _restore(module)
    if kernels == "off":
        for _, module, _, _ in found + layers + heads:
            _restore(module)
        for stage in found_stages:
            _restore(stage)
        parts = found, layers, heads, convolutions
        rows = [[Row(n, type(m).__name__, "kernels='off'", False) for n, m, _, _ in part] for part in parts]
        return Report(rows[0], kernels, *rows[1:])
    if kernels == "required":
        _require(found)
    report = Report([], kernels)
    _swap_convolutions(model, convolutions if winograd else [], frozen, report)
    for entries, rows, stand_in in (
        (found, report.rows, FusedForward),
        (layers, report.outside, OutsideForward),
        (heads, report.heads, HeadForward),
    ):
        for name, module, parts, reason in entries:
            detail = f"{_describe(parts)}{_backward_note(parts)}" if reason is None else reason
            rows.append(Row(name, type(module).__name__, detail, reason is None))
            if reason is None:
                module.forward = stand_in(module, kernels, frozen)
                module.forward.prepare(parts)
                report._blocks.append(module)
    for stage in found_stages if whole_stages and frozen and kernels != "reference" else []:
        if all(isinstance(block.__dict__.get("forward"), FusedForward) for block in stage.blocks):
            stage.forward = StageForward(stage)
            report._blocks.append(stage)
    if kernels == "auto" and report.swapped and all(p.conv.weight.device.type != "cuda" for _, _, p, _ in found if p):
        report.note = "the weights are on no GPU: until they are, every call runs the model's own code"
    if report.skipped:
        first = report.skipped[0]
        counts = len(report.skipped), len(found)
        _log.warning("%d of %d blocks stay as they are, e.g. %s: %s", *counts, first.name, first.detail)
    return report


def _swap_convolutions(model: nn.Module, convolutions: list[tuple], frozen: bool, report: Report) -> None:
    """Put convolutions on kernels, those of frozen weights together with what follows them."""
    swapped = [conv for _, conv, _, reason in convolutions if reason is None]
    holders = find_runs(model, swapped) if frozen else []
    runs = {run.conv: run for holder in holders for run in holder.runs}
    for name, conv, detail, reason in convolutions:
        detail = runs[conv].describe() if conv in runs else detail if reason is None else reason
        report.convolutions.append(Row(name, type(conv).__name__, detail, reason is None))
    stand_ins = [(holder.module, holder) for holder in holders]
    stand_ins += [(conv, WinogradForward(conv, frozen)) for conv in swapped if conv not in runs]
    for module, stand_in in stand_ins:
        module.forward = stand_in
        report._blocks.append(module)


def _find_stages(model: nn.Module) -> list[nn.Module]:
    """Every stage of a ConvFirst in the model whose parts have no hooks."""
    found = []
    for module in model.modules():
        if "ConvFirstStage" not in {cls.__name__ for cls in type(module).__mro__} or not len(module.blocks):
            continue
        try:
            check_hooks(module)
        except Unsupported:
            continue
        found.append(module)
    return found


def _examine(module: nn.Module) -> tuple[Parts | None, str | None]:
    """(parts, None) of a block that can be fused, (parts or None, reason) of one that can't, (None, None) of others."""
    try:
        parts = read_block(module)
        if parts is not None:
            check_hooks(module)
    except Unsupported as reason:
        return None, str(reason)
    if parts is None:
        return None, None
    weight = parts.conv.weight
    if weight.device.type != "cuda":
        return parts, None  # decided at each call, when the model may have moved to a GPU
    dtype = _expected_dtype(weight)
    conv = parts.conv
    reason = fused.refusal(
        weight.device, dtype, conv.in_channels, parts.expand.weight.shape[0], conv.kernel_size[0],
        conv.in_channels // conv.groups, parts.activation, parts.norm is not None,
    )  # fmt: skip
    return parts, reason


def _expected_dtype(weight: Tensor) -> torch.dtype:
    """What a block of these weights is likely to be called in: their own 16-bit dtype, or what autocast may ask for."""
    return weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float16


def _backward_note(parts: Parts | outside.OutsideParts) -> str:
    """What a report adds about a block whose gradients would be PyTorch's on the device that it is on."""
    if not isinstance(parts, Parts) or parts.conv.weight.device.type != "cuda":
        return ""
    weight = parts.conv.weight
    dtype = _expected_dtype(weight)
    reason = _backward_refusal(parts, weight.device, dtype)
    return "" if reason is None else f"; gradients by PyTorch: {reason}"


def _backward_refusal(parts: Parts, device: torch.device, dtype: torch.dtype) -> str | None:
    conv = parts.conv
    return backward.refusal(
        device, dtype, conv.in_channels, parts.expand.weight.shape[0], conv.kernel_size[0],
        conv.in_channels // conv.groups, parts.activation,
    )  # fmt: skip


def _examine_outside(
    layer: nn.Module, read: Callable[[nn.Module], outside.OutsideParts] = outside.read_outside
) -> tuple[outside.OutsideParts | None, str | None]:
    """(parts, None) of a stem, downsampling layer or head that kernels can run, (parts or None, reason) of others."""
    try:
        parts = read(layer)
        check_hooks(layer)
    except Unsupported as reason:
        return None, str(reason)
    device = parts.conv.weight.device
    return parts, outside.uncovered(parts, device.index or 0) if device.type == "cuda" else None


def _describe(parts: Parts | outside.OutsideParts) -> str:
    reason = _statistics_refusal(parts) if isinstance(parts, Parts) else None
    return parts.describe() + ("" if reason is None else f"; now its own PyTorch code: {reason}")


def _statistics_refusal(parts: Parts) -> str | None:
    """Why a block whose batch norms are in training mode can't run on the device that it is on, or None."""
    if not batch_norms.needs_statistics(parts):
        return None
    weight = parts.conv.weight
    dtype = _expected_dtype(weight)
    kernels = "auto" if weight.device.type == "cuda" else "reference"  # else the model may move to a GPU yet
    return batch_norms.refusal(parts, weight.device, dtype, kernels)


def _require(found: list) -> None:
    reasons = [reason or _statistics_refusal(parts) for _, _, parts, reason in found]
    problems = [
        f"{name} ({type(block).__name__}): {reason}"
        for (name, block, _, _), reason in zip(found, reasons, strict=True)
        if reason is not None
    ]
    if not found:
        problems = ["the model has no block of ConvFirst or of timm's ConvNeXt"]
    if not torch.cuda.is_available():
        problems.append("there is no CUDA device")
    if problems:
        raise RuntimeError("accelerate(kernels='required') is not possible:\n  " + "\n  ".join(problems))


def _restore(block: nn.Module) -> None:
    if isinstance(block.__dict__.get("forward"), FusedForward | StageForward | WinogradForward | RunsForward):
        del block.forward
