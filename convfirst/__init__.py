"""ConvFirst: convolutional networks made of blocks that fuse into single kernels, and the framework to train them.

Importing the package registers its models with timm, so that ``timm.create_model("convfirst_tiny")`` finds them.
"""

from convfirst import models
from convfirst.version import __version__

__all__ = ["__version__", "models"]
