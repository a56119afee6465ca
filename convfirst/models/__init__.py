"""Model families in the project's own code. Importing this package registers them with timm's model registry."""

from convfirst.models.convfirst import ConvFirst, ConvFirstBlock

__all__ = ["ConvFirst", "ConvFirstBlock"]
