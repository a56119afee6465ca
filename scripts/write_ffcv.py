#!/usr/bin/env python
"""Write an image folder's splits as FFCV files: ROOT/{train,val,test} to OUT/{train,val,test}.beton.

    python scripts/write_ffcv.py /data/imagenet /data/imagenet-ffcv --preset mixed --workers 32
    python train.py recipe=convfirst_tiny data=ffcv data.root=/data/imagenet-ffcv augment=convnext_ffcv

Before each file, its size is estimated from a sample of the images and compared with the free space.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from convfirst.data.ffcv import require_ffcv
from convfirst.data.image_tree import read_tree, require_same_classes


def main() -> None:
    try:
        require_ffcv()
        from convfirst.data.ffcv_writer import PRESETS, WriteError
    except ImportError as error:
        sys.exit(str(error))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder that holds train and val")
    parser.add_argument("out", type=Path, help="folder for the .beton files")
    lines = (
        f"{name}: short side {preset.short_side}, {100 * preset.jpeg:.0f} %% JPEG of quality {preset.quality}"
        for name, preset in PRESETS.items()
    )
    parser.add_argument("--preset", choices=PRESETS, default="mixed", help=f"of train: {'; '.join(lines)}")
    parser.add_argument("--eval-preset", choices=PRESETS, default="eval", help="of val and test")
    parser.add_argument("--splits", nargs="+", default=None, help="default: those of train, val and test that exist")
    parser.add_argument("--short-side", type=int, help="pixels, in place of the presets'")
    parser.add_argument("--jpeg", type=float, help="share of JPEGs, in place of the presets'")
    parser.add_argument("--quality", type=int, help="of the JPEGs, in place of the presets'")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    try:
        write(args, PRESETS)
    except (OSError, ValueError, WriteError) as error:
        sys.exit(f"{parser.prog}: {error}")


def write(args: argparse.Namespace, presets: dict) -> None:
    """Write every split; all trees are listed and compared before the first byte."""
    from convfirst.data.ffcv_writer import write_beton

    given = {name: getattr(args, name) for name in ("short_side", "jpeg", "quality") if getattr(args, name) is not None}
    splits = args.splits or [name for name in ("train", "val", "test") if (args.root / name).is_dir()]
    if not splits:
        raise FileNotFoundError(f"{args.root} holds none of train, val and test")
    trees = {split: read_tree(args.root / split) for split in splits}
    for tree in trees.values():
        require_same_classes(trees[splits[0]], tree)
    for split, tree in trees.items():
        preset = replace(presets[args.preset if split == "train" else args.eval_preset], **given)
        path = args.out / f"{split}.beton"
        write_beton(tree, path, preset, max(1, args.workers))
        print(f"wrote {len(tree)} images, {path.stat().st_size / 1e9:.2f} GB, to {path}")


if __name__ == "__main__":
    main()
