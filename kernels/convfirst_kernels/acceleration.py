"""Swaps a model's residual blocks for fused ones, in place, and back."""


class Report:
    pass


def accelerate(model, kernels="auto"):
    raise NotImplementedError
