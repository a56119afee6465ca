"""An image tree as FFCV files."""

import pytest


def write_betons(tree, root):
    """Train and val: uncompressed, short side 36 = floor(32 / 0.875). Without FFCV the test is skipped."""
    pytest.importorskip("ffcv")
    from convfirst.data.ffcv_writer import Preset, write_beton
    from convfirst.data.image_tree import read_tree

    for split in ("train", "val"):
        write_beton(read_tree(tree / split), root / f"{split}.beton", Preset(36, jpeg=0.0, page_size=1 << 21))
    return root
