"""Model families in the project's own code. Importing this package registers them with timm's model registry."""

from convfirst.models.convfirst import ConvFirst, ConvFirstBlock
from convfirst.models.plain import create_without

__all__ = ["ConvFirst", "ConvFirstBlock", "create_without"]
