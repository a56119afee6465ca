#!/usr/bin/env python
"""Write a small learnable tree of JPEGs in ImageNet's layout: ROOT/{train,val}/<class>/<image>.JPEG.

python scripts/make_sample_imagenet.py data/sample --classes 10 --train-images 100
python train.py recipe=convfirst_nano data.root=data/sample augment=light batch.global_size=128 optimizer.lr=1e-3
"""

import argparse
import os
import sys
from pathlib import Path

from convfirst.data.sample_tree import SampleTree


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("root", type=Path, help="folder to make; must not exist")
    parser.add_argument("--classes", type=int, default=SampleTree.num_classes)
    parser.add_argument("--train-images", type=int, default=SampleTree.train_images, help="in each class")
    parser.add_argument("--val-images", type=int, default=SampleTree.val_images, help="in each class")
    parser.add_argument("--min-side", type=int, default=SampleTree.min_side, help="pixels")
    parser.add_argument("--max-side", type=int, default=SampleTree.max_side, help="pixels")
    parser.add_argument("--quality", type=int, default=SampleTree.quality, help="of the JPEGs")
    parser.add_argument("--seed", type=int, default=SampleTree.seed)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    try:
        tree = SampleTree(
            num_classes=args.classes,
            train_images=args.train_images,
            val_images=args.val_images,
            min_side=args.min_side,
            max_side=args.max_side,
            seed=args.seed,
            quality=args.quality,
        )
        tree.write(args.root, args.workers)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    per_class = args.train_images + args.val_images
    print(f"wrote {args.classes * per_class} images of {args.classes} classes to {args.root}")


if __name__ == "__main__":
    main()
