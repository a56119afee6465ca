"""The curves of a run as a picture."""

import os
from pathlib import Path

from convfirst.training.csv_log import read_rows

_PANELS = {
    "loss": ["train/loss", "val/loss", "val/loss_ema"],
    "top-1 (%)": ["val/top1", "val/top1_ema"],
    "learning rate": ["train/lr"],
    "images/s": ["speed/images_per_s"],
}


def plot_curves(metrics_csv: str | Path, target: str | Path) -> None:
    """Draw the metrics of `CSVLog`'s file over the number of updates into the PNG file `target`."""
    from matplotlib.figure import Figure

    rows = read_rows(metrics_csv)
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, _PANELS.items(), strict=True):
        for name in names:
            points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axes.set(title=title, xlabel="update")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    temporary = Path(target).with_name(f".{Path(target).name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, target)
