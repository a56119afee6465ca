"""Direct convolution as an implicit matrix product (Lavin, 1501.06633, on today's GPUs)."""

from convfirst_kernels.direct.convolution import direct_conv2d

__all__ = ["direct_conv2d"]
