"""Winograd convolution: 3x3 filters, stride 1 (Lavin & Gray, arXiv 1509.09308)."""

from convfirst_kernels.winograd.convolution import winograd_conv2d
from convfirst_kernels.winograd.transforms import Transform, cook_toom

__all__ = ["Transform", "cook_toom", "winograd_conv2d"]
