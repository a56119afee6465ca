"""What one forward pass of a model computes and moves, operation by operation, without computing it.

The model runs on PyTorch's meta device; each operation that PyTorch would launch is recorded with its multiply-adds and
with the tensors that it reads and writes. What is fused with what is decided afterwards (`convfirst.analysis.kernels`).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

_ADDITIONS = {torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor}


@dataclass(frozen=True)
class Access:
    """A read or write of one value; `offset` tells parts of the same value apart."""

    value: int
    offset: int
    bytes: int


@dataclass(frozen=True)
class Operation:
    """One operation of the sequence.

    Attributes:
        name: of the operator in ATen, e.g. "convolution".
        module: path of the innermost module that ran it, "" for the model itself.
        macs: multiply-adds of a convolution or matrix product; 0 for all else, whose arithmetic isn't counted.
        contraction: whether it is a convolution or a matrix product.
        dtype: of its first input.
        reads: activations that it reads.
        weights: parameters and buffers that it reads.
        writes: values that it produces.
    """

    name: str
    module: str
    macs: int
    contraction: bool
    dtype: torch.dtype
    reads: tuple[Access, ...]
    weights: tuple[Access, ...]
    writes: tuple[Access, ...]


@dataclass(frozen=True)
class Trace:
    """The operations of one forward pass, in order.

    Attributes:
        model: class name of the model.
        batch: images in the batch.
        image_size: side of the square input in pixels.
        dtype: of activations and weights.
        outputs: the values that the model returns.
        blocks: paths of the residual blocks, outermost ones only: modules of a class that adds a shortcut.
    """

    model: str
    batch: int
    image_size: int
    dtype: torch.dtype
    operations: tuple[Operation, ...]
    outputs: frozenset[int]
    blocks: tuple[str, ...]

    @property
    def macs(self) -> int:
        return sum(operation.macs for operation in self.operations)

    @property
    def contractions(self) -> list[Operation]:
        """The convolutions and matrix products."""
        return [operation for operation in self.operations if operation.contraction]


def meta_model(name: str) -> nn.Module:
    """A model of timm's registry on the meta device, without weights.

    A constructor may compute with tensors by an operator that PyTorch's meta device lacks, as RegNet's does with
    `unique` in PyTorch 2.11; such a model is made on the CPU first.
    """
    try:
        with torch.device("meta"):
            return timm.create_model(name)
    except NotImplementedError:
        return timm.create_model(name).to("meta")


def trace(
    model: nn.Module, batch: int = 1, image_size: int = 224, dtype: torch.dtype = torch.float16, in_chans: int = 3
) -> Trace:
    """Record the forward pass of ``model`` in evaluation mode on a (batch, in_chans, image_size, image_size) input.

    Weights and activations are in ``dtype``, channels last. The model itself is left alone, and may be on the meta
    device; nothing is computed, so any batch costs the same. Fused attention, which the meta device lacks, is recorded
    as PyTorch's fallback, which computes 16-bit attention in float32: more traffic than a fused kernel's.

    Raises:
        ValueError: batch or image_size is below 1.
    """
    for name, value in (("batch", batch), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    shadow = copy.deepcopy(model).to("meta", dtype, memory_format=torch.channels_last).eval()
    shadow.requires_grad_(False)  # ModuleTracker fails on a module's input that is a view of a parameter
    x = torch.empty(batch, in_chans, image_size, image_size, device="meta", dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad(), ModuleTracker() as tracker:
        recorder = _Recorder(shadow, tracker)
        with recorder:
            result = shadow(x)
    outputs = frozenset(recorder.value_of(tensor) for tensor in tree_leaves(result) if isinstance(tensor, Tensor))
    return Trace(
        type(model).__name__, batch, image_size, dtype, tuple(recorder.operations), outputs, recorder.residual_blocks()
    )


@dataclass
class _Recorder(TorchDispatchMode):
    model: nn.Module
    tracker: ModuleTracker
    operations: list[Operation] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        weights = [*self.model.parameters(), *self.model.buffers()]
        self._weights = {_storage(weight) for weight in weights}
        self._values: dict[int, int] = {}  # the value that a storage holds now
        self._count = 0
        self._alive: list[Tensor] = weights  # a storage that is freed would give its address to another
        self._adding: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._record(func, args, kwargs, result)
        return result

    def _record(self, func, args, kwargs, result) -> None:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.numel()]
        self._alive += [*inputs, *outputs]
        sources = {_storage(tensor) for tensor in inputs}
        changes = func._schema.is_mutable
        if not inputs or not (changes or any(_storage(tensor) not in sources for tensor in outputs)):
            return  # makes an empty tensor or a view: nothing is launched that moves activations
        module = self._innermost()
        activations = [tensor for tensor in inputs if _storage(tensor) not in self._weights]
        if func in _ADDITIONS and len(activations) == 2 and activations[0].shape == activations[1].shape:
            self._adding.add(module)
        reads = _unique(self._access(tensor) for tensor in activations)
        weights = _unique(self._access(tensor) for tensor in inputs if _storage(tensor) in self._weights)
        for tensor in outputs:
            self._new_value(tensor)
        packet = func._overloadpacket
        contraction = packet in flop_registry
        flops = flop_registry[packet](*args, **kwargs, out_val=result) if contraction else 0
        self.operations.append(
            Operation(
                name=packet.__name__.rstrip("_"),
                module=module,
                macs=flops // 2,
                contraction=contraction,
                dtype=inputs[0].dtype,
                reads=reads,
                weights=weights,
                writes=_unique(self._access(tensor) for tensor in outputs),
            )
        )

    def _innermost(self) -> str:
        path = max((parent for parent in self.tracker.parents if parent != "Global"), key=len)
        return path.partition(".")[2]  # without the model's class

    def _access(self, tensor: Tensor) -> Access:
        size = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        return Access(self.value_of(tensor), tensor.storage_offset(), size)

    def value_of(self, tensor: Tensor) -> int:
        storage = _storage(tensor)
        if storage not in self._values:
            self._new_value(tensor)
        return self._values[storage]

    def _new_value(self, tensor: Tensor) -> None:
        self._values[_storage(tensor)] = self._count
        self._count += 1

    def residual_blocks(self) -> tuple[str, ...]:
        # A class is told by those of its instances that add; others of it, whose shapes differ, may have no shortcut.
        classes = {type(self.model.get_submodule(path)) for path in self._adding if path}
        paths = [path for path, module in self.model.named_modules() if path and type(module) in classes]
        inside = tuple(path + "." for path in paths)
        return tuple(path for path in paths if not path.startswith(inside))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _unique(accesses: Iterator[Access]) -> tuple[Access, ...]:
    return tuple(dict.fromkeys(accesses))
