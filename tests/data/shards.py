"""An image tree as WebDataset shards."""

import io
import json
import tarfile

from convfirst.data.image_tree import read_tree


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_shards(tree, root, split, name, json_labels=False, per_shard=10):
    images = read_tree(tree / split)
    for start in range(0, len(images), per_shard):
        with tarfile.open(root / name.format(start // per_shard), "w") as archive:
            for index in range(start, min(start + per_shard, len(images))):
                add(archive, f"{split}/{index:05d}.jpg", images.path(index).read_bytes())
                label = int(images.targets[index])
                if json_labels:
                    add(archive, f"{split}/{index:05d}.json", json.dumps({"label": label}).encode())
                else:
                    add(archive, f"{split}/{index:05d}.cls", str(label).encode())
