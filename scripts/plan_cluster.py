"""Plans ImageNet training on many GPUs on paper, from the measurements under results/.

    python scripts/plan_cluster.py              write the plan into README, between its markers
    python scripts/plan_cluster.py --check      fail if README holds another plan
    python scripts/plan_cluster.py --measure    time the data sources on one core of this machine: results/loader.json

An update of a data-parallel run takes its compute, images / (images/s of one GPU), and what the gradients' all-reduce
takes beyond the backward pass beside which it runs. The all-reduce is a ring over nodes (Patarasuk and Yuan 2009) of
2 (n - 1) / n x bytes / bandwidth + 2 (n - 1) x latency, n nodes. The global batch is the recipe's: more GPUs have
fewer images each. The cores and bytes/s are those with which the loader keeps up.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

RESULTS = REPOSITORY / "results"
TRAINING = "training-throughput.json"
START, END = "<!-- plan by scripts/plan_cluster.py -->\n", "<!-- end of plan -->"
MODELS = ("convnext_tiny", "convfirst_nano")
GPUS = (8, 64, 512)
GPUS_PER_NODE = 8
GLOBAL_BATCH = 4096  # configs/recipe/base/convnext.yaml
TRAIN_IMAGES = 1_281_167  # ImageNet-1K
EPOCHS = 300

# Assumed: nobody measured these here.
LATENCY_S = 5e-6  # one hop between nodes
BACKWARD_SHARE = 2 / 3  # of the compute: twice the forward's work
TRAIN_FACTOR = 3  # training against inference, where only the latter has been measured
JPEG_BYTES = 110e3  # of a training image: 138 GB / 1,281,167
CORES_PER_GPU = 16
NETWORKS = {"8 x 400 Gb/s": 8 * 400e9 / 8, "100 Gb/s": 100e9 / 8}  # bytes/s of a node


@dataclass(frozen=True)
class Model:
    """What the plan wants to know of one model; `source` says where the speed is from."""

    name: str
    parameters: float
    images_per_s: float  # of one GPU in training
    source: str


def all_reduce_s(parameters: float, bytes_each: int, nodes: int, bandwidth: float) -> float:
    """Seconds of a ring all-reduce of the gradients over `nodes` nodes of `bandwidth` bytes/s each.

    What NVLink does inside a node is taken to cost nothing.
    """
    return 2 * (nodes - 1) / nodes * parameters * bytes_each / bandwidth + 2 * (nodes - 1) * LATENCY_S


def plan(model: Model, gpus: int, bandwidth: float, bytes_each: int = 4, batch: int = GLOBAL_BATCH) -> dict[str, float]:
    """Times (s) and rates of one update of `batch` images on `gpus` GPUs; the loader is taken to keep up."""
    nodes = -(-gpus // GPUS_PER_NODE)
    compute = batch / gpus / model.images_per_s
    reduce = all_reduce_s(model.parameters, bytes_each, nodes, bandwidth)
    exposed = max(0.0, reduce - BACKWARD_SHARE * compute)
    step = compute + exposed
    return {
        "images_per_gpu": batch / gpus,
        "compute": compute,
        "reduce": reduce,
        "exposed": exposed,
        "step": step,
        "images_per_s": batch / step,
        "efficiency": compute / step,
        "minutes": EPOCHS * TRAIN_IMAGES / batch * step / 60,
    }


def limit(model: Model, bandwidth: float, bytes_each: int = 4) -> int:
    """The most GPUs, in whole nodes up to one image each, that spend at least 90 % of an update computing."""
    counts = range(GPUS_PER_NODE, GLOBAL_BATCH + 1, GPUS_PER_NODE)
    return max(n for n in counts if plan(model, n, bandwidth, bytes_each)["efficiency"] >= 0.9)


def read(name: str) -> dict | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def models() -> list[Model]:
    """The planned models, with their training speed, or a third of their inference speed where that is all there is."""
    sizes = {row["name"]: row["mparams"] * 1e6 for row in read("cost.json")["rows"]}
    return [Model(name, sizes[name], *_speed(name)) for name in MODELS]


def _speed(name: str) -> tuple[float, str]:
    for row in _trained(name, data="synthetic", devices=1):
        results = read(TRAINING)
        when = f"commit {row['other_commit']}" if "other_commit" in row else results["date"]
        return row["images_per_s"], f"measured: {row['precision']}, batch {row['batch']}, {results['device']}, {when}"
    inference = read("models-h200.json")
    row = next((row for row in inference["rows"] if row["peer"] == f"{name} inductor"), None)
    if row is None:
        sys.exit(f"neither training nor inference of {name} has been measured; it can't be planned")
    how = f"{row['dtype']} under Inductor, batch {row['batch']}, {inference['device']}, {inference['date']}"
    return 1e3 * row["batch"] / row["peer_ms"] / TRAIN_FACTOR, f"assumed: 1/{TRAIN_FACTOR} of inference's, {how}"


def _trained(name: str, **wanted: str | int) -> list[dict]:
    """Rows of the training benchmark."""
    rows = (read(TRAINING) or {"rows": []})["rows"]
    return [row for row in rows if row["model"] == name and all(row[key] == value for key, value in wanted.items())]


def _observed(model: Model) -> str:
    """What the training benchmark says of loaders and of several GPUs, beside what is planned."""
    text = ""
    for row in _trained(model.name):
        share = row["images_per_s"] / row["devices"] / model.images_per_s
        if row["data"] != "synthetic" or row["devices"] > 1:
            what = f"{row['devices']} GPU{'s' if row['devices'] > 1 else ''}, data={row['data']}"
            text += f"- {model.name}, measured on {what}: {row['images_per_s']:,.0f} images/s, "
            text += f"{share:.0%} of the above on each GPU.\n"
    return text


def section() -> str:
    """The plan as Markdown."""
    chosen, loader = models(), read("loader.json")
    cores = {row["name"]: row["images_per_core_s"] for row in loader["rows"]} if loader else {}
    columns = [
        "model",
        "GPUs",
        "images a GPU",
        "compute ms",
        *(f"{network}: all-reduce / step ms (compute's share)" for network in NETWORKS),
    ]
    columns += [f"minutes for {EPOCHS} epochs, {next(iter(NETWORKS))}", "reads GB/s"]
    lines = [columns, ["---"] * len(columns)]
    for model in chosen:
        for gpus in GPUS:
            plans = [plan(model, gpus, bandwidth) for bandwidth in NETWORKS.values()]
            line = [model.name, str(gpus), f"{plans[0]['images_per_gpu']:g}", f"{1e3 * plans[0]['compute']:.1f}"]
            for one in plans:
                line.append(f"{1e3 * one['reduce']:.2f} / {1e3 * one['step']:.1f} ({one['efficiency']:.0%})")
            lines.append([*line, f"{plans[0]['minutes']:.0f}", f"{plans[0]['images_per_s'] * JPEG_BYTES / 1e9:.1f}"])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
    text += "".join(f"- {m.name}: {m.images_per_s:,.0f} images/s on one GPU ({m.source}).\n" for m in chosen)
    text += "".join(_observed(model) for model in chosen)
    for model in chosen:
        ends = [f"{limit(model, bandwidth):,} GPUs over {network}" for network, bandwidth in NETWORKS.items()]
        half = limit(model, NETWORKS["100 Gb/s"], bytes_each=2)
        text += f"- {model.name} stays at 90 % efficiency up to {' and '.join(ends)} a node, "
        text += f"with gradients of 2 bytes up to {half:,} over the latter.\n"
    if loader:
        where = (
            f"{loader['device']}, {loader['date']}, {loader['rows'][0]['width']} x {loader['rows'][0]['height']} pixels"
        )
        for name, rate in cores.items():
            needed = ", ".join(f"{m.name} {m.images_per_s / rate:.0f}" for m in chosen)
            fed = ", ".join(f"{min(1, CORES_PER_GPU * rate / m.images_per_s):.0%} of {m.name}" for m in chosen)
            text += f"- {name} gives {rate:,.0f} images for a CPU second ({where}). Cores that a GPU needs: {needed}; "
            text += f"{CORES_PER_GPU} feed {fed}.\n"
    else:
        text += "- Images/s of one core: not measured yet.\n"
    return text


def fill(readme: str) -> str:
    """`readme` with the plan between its markers."""
    before, rest = readme.split(START)
    return before + START + section() + END + rest.split(END, 1)[1]


def measure(images: int = 200) -> list[dict]:
    """Images/s of one core: images / CPU seconds of this process, for what the recipes do to an image."""
    import numpy as np
    from PIL import Image

    from convfirst.app.results import write_results

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for split in ("train", "val"):
            for label in range(2):
                (root / split / str(label)).mkdir(parents=True)
                for i in range(images // 2 if split == "train" else 1):
                    noise = np.random.default_rng(i).integers(0, 256, (47, 63, 3), dtype=np.uint8)
                    picture = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
                    picture.save(root / split / str(label) / f"{i}.jpg", quality=90)
        size = sum(path.stat().st_size for path in root.glob("train/*/*")) / images
        rows = [_timed("image_folder", root, images, "convnext")]
        if _write_ffcv(root):
            rows.append(_timed("ffcv", root, images, "convnext_ffcv"))
    for row in rows:
        row |= {"width": 500, "height": 375, "jpeg_bytes": round(size)}
    print(write_results(RESULTS / "loader.json", "loader", rows))
    return rows


def _write_ffcv(root: Path) -> bool:
    try:
        from convfirst.data.ffcv_writer import Preset, write_beton
    except ImportError:
        return False
    from convfirst.data.image_tree import read_tree

    for split in ("train", "val"):
        write_beton(read_tree(root / split), root / f"{split}.beton", Preset(500, jpeg=1.0))
    return True


def _timed(source: str, root: Path, images: int, augment: str) -> dict:
    """One epoch after a first one, which compiles and fills caches."""
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    torch.set_num_threads(1)
    overrides = [
        "recipe=convfirst_tiny",
        f"data={source}",
        f"augment={augment}",
        f"data.root={root}",
        "data.batch_size=20",
    ]
    overrides.append(f"data.num_workers={0 if source == 'image_folder' else 1}")
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "configs")):
        data = instantiate(compose("train", overrides).data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.set_position(epoch, 0)
        start, seen = time.process_time(), 0
        for batch, _ in loader:
            seen += len(batch)
    return {"name": source, "images_per_core_s": round(seen / (time.process_time() - start), 1), "augment": augment}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--measure", action="store_true")
    arguments = parser.parse_args()
    if arguments.measure:
        measure()
        return
    readme = REPOSITORY / "README.md"
    before = readme.read_text()
    after = fill(before)
    if arguments.check and after != before:
        sys.exit("README's plan isn't that of results/; run scripts/plan_cluster.py")
    if not arguments.check:
        readme.write_text(after)


if __name__ == "__main__":
    main()
