"""timm's models that lack what recipes set for residual blocks with layer scale."""

from collections.abc import Sequence
from typing import Any

import timm
import torch.nn as nn


def create_without(model_name: str, unused: Sequence[str], **options: Any) -> nn.Module:
    """``timm.create_model(model_name, **options)`` without the options named in `unused`."""
    return timm.create_model(model_name, **{key: value for key, value in options.items() if key not in unused})
