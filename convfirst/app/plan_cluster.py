"""Plans ImageNet training on many GPUs on paper, from the measurements under results/.

An update of a data-parallel run takes its compute, images / (images/s of one GPU), and what the gradients' all-reduce
takes beyond the backward pass beside which it runs. The all-reduce is a ring over nodes (Patarasuk and Yuan 2009) of
2 (n - 1) / n x bytes / bandwidth + 2 (n - 1) x latency, n nodes. The global batch is the recipe's: more GPUs have
fewer images each, and the rate is the measured one at that batch. Where it isn't measured the nearest larger batch's
stands for it, an upper bound; what follows from it is marked. More images than the largest measured batch are several
passes of that. The cores and bytes/s are those with which the loader keeps up.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from convfirst.app.results import REPOSITORY

RESULTS = REPOSITORY / "results"
GRAPH, STEPS, TRAINING = "training-throughput-graph.json", "training-h200.json", "training-throughput.json"
# Where a recipe's rates are from: the first file that has any. What it is, and which rows.
SOURCES = {
    GRAPH: ("the trainer with kernels and CUDA graphs", {"data": "synthetic", "devices": 1, "kernels": "required"}),
    STEPS: ("bare steps with kernels", {"kernels": "required"}),
    TRAINING: ("the trainer without kernels", {"data": "synthetic", "devices": 1, "kernels": "off"}),
}
ALL = {"precision": "bf16-mixed", "image_size": 224}
START, END = "<!-- plan by scripts/plan_cluster.py -->\n", "<!-- end of plan -->"
MODELS = ("convnext_tiny", "convfirst_tiny", "convfirst_nano")
GPUS = (8, 64, 512)
GPUS_PER_NODE = 8
GLOBAL_BATCH = 4096  # configs/recipe/base/convnext.yaml
TRAIN_IMAGES = 1_281_167  # ImageNet-1K
EPOCHS = 300
WAITING = 0.5  # data_wait from which on a training's rate is taken to be its loader's: most of the time

# Assumed: nobody measured these here.
LATENCY_S = 5e-6  # one hop between nodes
BACKWARD_SHARE = 2 / 3  # of the compute: twice the forward's work
JPEG_BYTES = 110e3  # of a training image: 138 GB / 1,281,167
CORES_PER_GPU = 16
NETWORKS = {"8 x 400 Gb/s": 8 * 400e9 / 8, "100 Gb/s": 100e9 / 8}  # bytes/s of a node


@dataclass(frozen=True)
class Model:
    """What the plan wants to know of one model; `source` says where its rates are from."""

    name: str
    parameters: float
    rates: dict[int, float]  # images/s of one GPU in training, by the batch that they were measured with
    source: str

    @property
    def best(self) -> float:
        """Images/s of one GPU with the largest measured batch."""
        return self.rates[max(self.rates)]

    def rate(self, images: float) -> tuple[float, bool]:
        """Images/s of one GPU that has `images` of them in an update, and whether that is an upper bound only."""
        larger = [batch for batch in self.rates if batch >= images]
        batch = min(larger, default=max(self.rates))
        return self.rates[batch], batch > images


def all_reduce_s(parameters: float, bytes_each: int, nodes: int, bandwidth: float) -> float:
    """Seconds of a ring all-reduce of the gradients over `nodes` nodes of `bandwidth` bytes/s each.

    What NVLink does inside a node is taken to cost nothing.
    """
    return 2 * (nodes - 1) / nodes * parameters * bytes_each / bandwidth + 2 * (nodes - 1) * LATENCY_S


def plan(model: Model, gpus: int, bandwidth: float, bytes_each: int = 4, batch: int = GLOBAL_BATCH) -> dict[str, float]:
    """Times (s) and rates of one update of `batch` images on `gpus` GPUs; the loader is taken to keep up.

    `efficiency` is the rate over that of as many single GPUs with the largest measured batch. With `bound`, times are
    lower and rates upper bounds.
    """
    nodes = -(-gpus // GPUS_PER_NODE)
    rate, bound = model.rate(batch / gpus)
    compute = batch / gpus / rate
    reduce = all_reduce_s(model.parameters, bytes_each, nodes, bandwidth)
    exposed = max(0.0, reduce - BACKWARD_SHARE * compute)
    step = compute + exposed
    return {
        "images_per_gpu": batch / gpus,
        "gpu_images_per_s": rate,
        "bound": bound,
        "compute": compute,
        "reduce": reduce,
        "exposed": exposed,
        "step": step,
        "images_per_s": batch / step,
        "efficiency": batch / step / gpus / model.best,
    }


def limit(model: Model, bandwidth: float, bytes_each: int = 4) -> int:
    """The most GPUs, in whole nodes up to one image each, of which each gives 90 % of its best rate or more."""
    counts = range(GPUS_PER_NODE, GLOBAL_BATCH + 1, GPUS_PER_NODE)
    return max(n for n in counts if plan(model, n, bandwidth, bytes_each)["efficiency"] >= 0.9)


def read(name: str) -> dict | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def models() -> list[Model]:
    """The planned models, with their training rates."""
    sizes = {row["name"]: row["mparams"] * 1e6 for row in read("cost.json")["rows"]}
    return [Model(name, sizes[name], *_rates(name)) for name in MODELS]


def _rates(name: str) -> tuple[dict[int, float], str]:
    """Images/s of one GPU by batch, and what measured them: rows of the fewest GPUs, then the fastest."""
    for file, (what, wanted) in SOURCES.items():
        rows = _rows(file, name=name, **wanted)
        rows.sort(key=lambda row: (-row["devices"], row["images_per_s"]))
        if chosen := dict(sorted({row["batch"]: row for row in rows}.items(), reverse=True)):
            results = read(file)
            commits = {row.get("other_commit", results["commit"][:10]): None for row in chosen.values()}
            modes = {f"mode={row['mode']}": None for row in chosen.values() if "mode" in row}
            many = {f"on {_gpus(row['devices'])}": None for row in chosen.values() if row["devices"] > 1}
            how = [what, *modes, *many, ALL["precision"], results["device"], f"commit {', '.join(commits)}"]
            return {batch: row["images_per_s"] / row["devices"] for batch, row in chosen.items()}, ", ".join(how)
    sys.exit(f"no training of {name} has been measured; it can't be planned")


def _rows(file: str, **wanted: str | int) -> list[dict]:
    rows = [{"kernels": "off"} | row for row in (read(file) or {"rows": []})["rows"]]  # the oldest don't name them
    return [row for row in rows if all(row[key] == value for key, value in (ALL | wanted).items())]


def _scaling() -> list[str]:
    """What was measured on several GPUs with images that need no loader: the share of as many single ones' rate."""
    found = []
    for file, (what, wanted) in SOURCES.items():
        alike = {key: value for key, value in wanted.items() if key != "devices"}
        for row in _rows(file, **alike):
            ones = _rows(file, **alike, name=row["name"], batch=row["batch"], devices=1)
            scaling = row.get("scaling") or (row["images_per_s"] / ones[-1]["images_per_s"] if ones else None)
            if row["devices"] > 1 and scaling:
                found.append(f"{row['name']} {scaling / row['devices']:.0%} on {_gpus(row['devices'])} ({what})")
    return found


@dataclass(frozen=True)
class Loader:
    """How many images/s of a source one core was seen to give; `trained` while a GPU took them."""

    source: str
    how: str
    images_per_core_s: float
    trained: bool


def loaders() -> list[Loader]:
    """All that was measured of the sources, those of training first."""
    found = []
    training, sources, alone = (read(name) or {"rows": []} for name in (TRAINING, "data-loading.json", "loader.json"))
    for row in training["rows"]:
        if row["data"] != "synthetic" and row["data_wait"] >= WAITING:
            how = f"training {row['name']}, {_gpus(row['devices'])} with {row['num_workers']} workers"
            each = " each" if row["devices"] > 1 else ""
            rate = row["images_per_s"] / row["devices"] / row["num_workers"]
            found.append(Loader(row["data"], f"{how}{each}, host of {training['device']}", rate, trained=True))
    for row in sources["rows"]:
        how = f"alone, {row['workers']} workers on {row['cores']} cores, {row['processor']}, "
        how += f"{row['bytes_per_image'] / 1e3:.0f} kB an image"
        found.append(Loader(row["name"], how, row["images_per_s"] / row["cores"], trained=False))
    for row in alone["rows"]:
        how = f"alone, CPU seconds of one process, {alone['device']}, {row['width']} x {row['height']} pixels, "
        how += f"{row['jpeg_bytes'] / 1e3:.0f} kB an image"
        found.append(Loader(row["name"], how, row["images_per_core_s"], trained=False))
    return sorted(found, key=lambda loader: not loader.trained)


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def planned_loaders() -> dict[str, float]:
    """Images/s of a core that the plan takes for each source: the least of those of training."""
    rates: dict[str, float] = {}
    for loader in loaders():
        if loader.trained:
            rates[loader.source] = min(rates.get(loader.source, loader.images_per_core_s), loader.images_per_core_s)
    return rates


def section() -> str:
    """The plan as Markdown."""
    chosen, cores = models(), planned_loaders()
    text = _table(_plans(chosen, cores)) + "\n"
    text += "".join(f"- {_described(model)}\n" for model in chosen)
    if scaling := _scaling():
        text += f"- Measured on one host, of as many single GPUs' rate: {', '.join(scaling)}.\n"
    for model in chosen:
        ends = [f"{limit(model, bandwidth):,} GPUs over {network}" for network, bandwidth in NETWORKS.items()]
        half = limit(model, NETWORKS["100 Gb/s"], bytes_each=2)
        text += f"- {model.name}: a GPU keeps 90 % of its best rate up to at most {' and '.join(ends)} a node, "
        text += f"with gradients of 2 bytes up to {half:,} over the latter.\n"
    for source, rate in cores.items():
        needed = ", ".join(f"{model.name} {model.best / rate:.0f}" for model in chosen)
        fed = ", ".join(f"{min(1, CORES_PER_GPU * rate / model.best):.0%} of {model.name}" for model in chosen)
        text += f"- {source}, planned with {rate:,.0f} images a core and second. Cores that a GPU needs: {needed}; "
        text += f"{CORES_PER_GPU} feed {fed}.\n"
    lines = [["source", "measured", "images a core and second"]]
    return text + "\n" + _table(lines + [[one.source, one.how, f"{one.images_per_core_s:,.0f}"] for one in loaders()])


def _described(model: Model) -> str:
    rates = [f"{rate:,.0f} at batch {batch}" for batch, rate in model.rates.items()]
    text = f"{model.name}: images/s of one GPU {', '.join(rates)} ({model.source})."
    missing = [f"{GLOBAL_BATCH / gpus:g}" for gpus in GPUS if model.rate(GLOBAL_BATCH / gpus)[1]]
    if missing:
        text += f" Not measured at batch {' and '.join(missing)}: the next larger one's rate is an upper bound there."
    return text


def _plans(chosen: list[Model], cores: dict[str, float]) -> list[list[str]]:
    fast = next(iter(NETWORKS))
    lines = [["model", "GPUs", "images a GPU", "images/s of one", "compute ms"]]
    lines[0] += [f"{network}: all-reduce / step ms (of linear)" for network in NETWORKS]
    lines[0] += [f"{fast}: reads GB/s", f"{fast}: minutes for {EPOCHS} epochs"]
    lines[0] += [f"with {CORES_PER_GPU} cores a GPU and {source}" for source in cores]
    for model in chosen:
        for gpus in GPUS:
            plans = [plan(model, gpus, bandwidth) for bandwidth in NETWORKS.values()]
            least, most = ("≥ ", "≤ ") if plans[0]["bound"] else ("", "")
            line = [model.name, str(gpus), f"{plans[0]['images_per_gpu']:g}"]
            line += [f"{most}{plans[0]['gpu_images_per_s']:,.0f}", f"{least}{1e3 * plans[0]['compute']:.1f}"]
            for one in plans:
                line.append(
                    f"{1e3 * one['reduce']:.2f} / {least}{1e3 * one['step']:.1f} ({most}{one['efficiency']:.0%})"
                )
            rate = plans[0]["images_per_s"]
            line.append(f"{most}{rate * JPEG_BYTES / 1e9:.1f}")
            for fed in (rate, *(min(rate, gpus * CORES_PER_GPU * core) for core in cores.values())):
                line.append(f"{least}{EPOCHS * TRAIN_IMAGES / fed / 60:.0f}")
            lines.append(line)
    return lines


def _table(lines: list[list[str]]) -> str:
    head, *body = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *body))


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


def write_plan(check: bool = False) -> None:
    """Write the plan into README, between its markers; with ``check`` exit with a message if another one is there."""
    readme = REPOSITORY / "README.md"
    before = readme.read_text()
    after = fill(before)
    if check and after != before:
        sys.exit("README's plan isn't that of results/; run scripts/plan_cluster.py")
    if not check:
        readme.write_text(after)
