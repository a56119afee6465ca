"""Sharding of a timm-like model for FSDP2."""

import torch
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
    for stage in getattr(model, "stages", ()):
        for block in getattr(stage, "blocks", ()):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
