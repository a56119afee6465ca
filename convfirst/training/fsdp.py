"""Sharding of a timm-like model for FSDP2."""

from collections.abc import Iterator

import torch
import torch._dynamo
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard `model` in place: each residual block of ``model.stages`` is a unit, and the rest is another.

    The weights end up contiguous, as FSDP2 wants them.

    `mesh` is Lightning's two-dimensional one: weights are sharded over its second dimension (the devices of a node by
    default) and replicated over the first (the nodes).
    """
    model.to(memory_format=torch.contiguous_format)
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def compile_sharded(model: nn.Module, **options) -> None:
    """Compile a model that `shard` has sharded, in place and in pieces: each residual block, and what lies between.

    The hooks that gather a unit's weights stay outside of what is compiled; compiled with the whole model they would
    break its graph at every block. `options` are those of `torch.compile`.
    """
    blocks = list(_blocks(model))
    stages = getattr(model, "stages", ())
    between = [getattr(model, "stem", None), *(getattr(stage, "downsample", None) for stage in stages)]
    pieces = [*blocks, *between, getattr(model, "head", None)] if blocks else [model]
    # Blocks share their code and differ in drop path's rate, for each of which it is compiled anew.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(blocks))
    for piece in filter(None, pieces):
        piece.forward = torch.compile(piece.forward, **options)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for stage in getattr(model, "stages", ()):
        yield from getattr(stage, "blocks", ())
