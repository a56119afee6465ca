"""The kernel sequence of a model: which operations of a trace run together, and what each kernel then moves.

A kernel reads from memory what was produced outside it, and writes what is used outside it; what stays inside costs no
traffic. Three partitions of the same operations are compared:

- `layer_by_layer`: one kernel an operation, as eager PyTorch launches them;
- `compiled`: convolutions and matrix products alone, and everything between two of them in one kernel. This is the
  least that a compiler of PyTorch Inductor's kind moves, which fuses pointwise operations and reductions with each
  other but not with calls of cuDNN and cuBLAS;
- `block_fused`: every residual block one kernel, the rest as in `compiled`. For blocks with squeeze-and-excite, a
  stride or a full 3x3 convolution this is a bound and not a kernel that exists.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from convfirst.analysis.trace import Operation, Trace

Partition = Callable[[Trace], list[list[int]]]


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: the module or block that it computes, and its operators.
        macs: multiply-adds of its convolutions and matrix products.
        read_bytes: activations read from memory, each once.
        write_bytes: activations written to memory.
        weight_bytes: parameters and buffers read from memory, each once.
        block: path of the residual block that it belongs to, None outside of blocks.
    """

    name: str
    macs: int
    read_bytes: int
    write_bytes: int
    weight_bytes: int
    block: str | None

    @property
    def activation_bytes(self) -> int:
        return self.read_bytes + self.write_bytes

    @property
    def bytes(self) -> int:
        """Least memory traffic of the kernel."""
        return self.activation_bytes + self.weight_bytes

    @property
    def intensity(self) -> float:
        """Operational intensity in FLOP per byte, a multiply-add being two FLOP."""
        return 2 * self.macs / self.bytes


def layer_by_layer(trace: Trace) -> list[list[int]]:
    return [[i] for i in range(len(trace.operations))]


def compiled(trace: Trace) -> list[list[int]]:
    return _compiled_runs(trace, range(len(trace.operations)))


def block_fused(trace: Trace) -> list[list[int]]:
    groups: list[list[int]] = []
    previous: str | None = None
    for i, operation in enumerate(trace.operations):
        block = block_of(trace, operation)
        if groups and block == previous:
            groups[-1].append(i)
        else:
            groups.append([i])
        previous = block
    return [part for group in groups for part in _whole_or_runs(trace, group)]


PARTITIONS: Mapping[str, Partition] = {
    "layer_by_layer": layer_by_layer,
    "compiled": compiled,
    "block_fused": block_fused,
}


def kernels(trace: Trace, partition: str) -> list[Kernel]:
    """The kernels of ``trace`` under one of `PARTITIONS`, in order.

    Raises:
        ValueError: ``partition`` is unknown.
    """
    if partition not in PARTITIONS:
        raise ValueError(f"partition={partition!r} is unknown; accepted: {', '.join(PARTITIONS)}")
    return _kernels(trace, PARTITIONS[partition](trace))


def layers(trace: Trace) -> list[Kernel]:
    """One entry a module that computes something, as if it were one kernel: a layer's MACs, traffic and intensity."""
    groups: dict[str, list[int]] = {}
    for i, operation in enumerate(trace.operations):
        groups.setdefault(operation.module, []).append(i)
    return _kernels(trace, groups.values())


def blocks(trace: Trace) -> list[Kernel]:
    """One entry a residual block, as if it were one kernel."""
    groups: dict[str, list[int]] = {}
    for i, operation in enumerate(trace.operations):
        if (block := block_of(trace, operation)) is not None:
            groups.setdefault(block, []).append(i)
    return _kernels(trace, groups.values())


def block_of(trace: Trace, operation: Operation) -> str | None:
    """Path of the residual block that the operation belongs to."""
    path = operation.module + "."
    return next((block for block in trace.blocks if path.startswith(block + ".")), None)


def _kernels(trace: Trace, groups: Iterable[Sequence[int]]) -> list[Kernel]:
    users: dict[int, set[int]] = {}
    for i, operation in enumerate(trace.operations):
        for access in operation.reads:
            users.setdefault(access.value, set()).add(i)
    return [_kernel(trace, group, users) for group in groups]


def _whole_or_runs(trace: Trace, group: list[int]) -> list[list[int]]:
    in_block = block_of(trace, trace.operations[group[0]]) is not None
    return [group] if in_block else _compiled_runs(trace, group)


def _compiled_runs(trace: Trace, indices: Iterable[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    joins = False  # whether the last run takes another operation
    for i in indices:
        contraction = trace.operations[i].contraction
        if joins and not contraction:
            runs[-1].append(i)
        else:
            runs.append([i])
        joins = not contraction
    return runs


def _kernel(trace: Trace, group: Sequence[int], users: Mapping[int, set[int]]) -> Kernel:
    operations, inside = [trace.operations[i] for i in group], set(group)
    produced = {access.value: access.bytes for operation in operations for access in operation.writes}
    reads = {access for operation in operations for access in operation.reads if access.value not in produced}
    weights = {access for operation in operations for access in operation.weights}
    kept = [value for value in produced if value in trace.outputs or users.get(value, set()) - inside]
    return Kernel(
        name=_name(trace, operations),
        macs=sum(operation.macs for operation in operations),
        read_bytes=sum(access.bytes for access in reads),
        write_bytes=sum(produced[value] for value in kept),
        weight_bytes=sum(access.bytes for access in weights),
        block=block_of(trace, operations[0]),
    )


def _name(trace: Trace, operations: Sequence[Operation]) -> str:
    modules = list(dict.fromkeys(operation.module for operation in operations))
    block = block_of(trace, operations[0])
    if len(modules) > 1 and block is not None and all(block_of(trace, o) == block for o in operations):
        modules = [block]
    names = list(dict.fromkeys(operation.name.removeprefix("native_") for operation in operations))
    shown = ", ".join(names) if len(names) <= 4 else f"{names[0]}, ..., {names[-1]}"
    place = modules[0] if len(modules) == 1 else f"{modules[0]} ... {modules[-1]}"
    return f"{place or 'model'}: {shown}"
