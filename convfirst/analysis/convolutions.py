"""Arithmetic of the convolution layers that the Winograd and maxDNN papers measure."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ConvLayer:
    """A convolution with square filters, on images of height x width.

    Attributes:
        depth: how many such layers the network has.
    """

    name: str
    channels: int
    height: int
    width: int
    filters: int
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1
    depth: int = 1

    @property
    def output_height(self) -> int:
        return (self.height + 2 * self.padding - self.kernel_size) // self.stride + 1

    @property
    def output_width(self) -> int:
        return (self.width + 2 * self.padding - self.kernel_size) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiply-adds of one image and one such layer."""
        return self.output_height * self.output_width * self.filters * self.channels * self.kernel_size**2

    def bytes(self, batch: int, size: int = 2) -> int:
        """Least memory traffic of one such layer: input, filters and output once, ``size`` bytes an element."""
        inputs = batch * self.channels * self.height * self.width
        outputs = batch * self.filters * self.output_height * self.output_width
        return size * (inputs + outputs + self.filters * self.channels * self.kernel_size**2)

    def intensity(self, batch: int, size: int = 2) -> float:
        """Operational intensity in FLOP per byte."""
        return 2 * self.macs * batch / self.bytes(batch, size)


@dataclass(frozen=True)
class WinogradTile:
    """F(m x m, r x r): a tile of m x m outputs of an r x r convolution by (m + r - 1)^2 multiplications.

    Attributes:
        data, filter, inverse: floating-point operations of the transforms of one tile, or None where not known.
    """

    m: int
    r: int
    data: int | None = None
    filter: int | None = None
    inverse: int | None = None

    @property
    def name(self) -> str:
        return f"F({self.m}x{self.m},{self.r}x{self.r})"

    @property
    def multiplications(self) -> int:
        return (self.m + self.r - 1) ** 2

    @property
    def direct_multiplications(self) -> int:
        return (self.m * self.r) ** 2

    @property
    def saving(self) -> float:
        """How many times fewer multiplications than direct convolution."""
        return self.direct_multiplications / self.multiplications

    def tiles(self, layer: ConvLayer) -> int:
        return math.ceil(layer.output_height / self.m) * math.ceil(layer.output_width / self.m)

    def flops(self, layer: ConvLayer, batch: int) -> int:
        """Floating-point operations of one layer with its transforms; partial tiles at the border count in full.

        Raises:
            ValueError: the layer is no r x r convolution of stride 1, or the transforms' costs aren't known.
        """
        if layer.kernel_size != self.r or layer.stride != 1:
            raise ValueError(f"{self.name} needs {self.r}x{self.r} filters and stride 1; {layer.name} has others")
        if None in (self.data, self.filter, self.inverse):
            raise ValueError(f"the transforms' costs of {self.name} are not known")
        tiles, products = batch * self.tiles(layer), layer.channels * layer.filters
        transforms = tiles * (self.data * layer.channels + self.inverse * layer.filters) + self.filter * products
        return 2 * tiles * self.multiplications * products + transforms

    def speedup_bound(self, layer: ConvLayer, batch: int) -> float:
        """Direct convolution's operations over Winograd's, transforms included."""
        return 2 * layer.macs * batch / self.flops(layer, batch)


def tile_quantisation(layer: ConvLayer, batch: int, tile: int) -> float:
    """Useful share of a direct kernel's work whose tiles hold ``tile`` filters x ``tile`` images, as maxDNN's do."""
    return math.prod(n / (tile * math.ceil(n / tile)) for n in (layer.filters, batch))
