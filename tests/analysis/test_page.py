"""The efficiency gap's web page, as Chromium draws it."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from convfirst.analysis.latency import Accuracy, Measurement, Point
from convfirst.analysis.plots import write_efficiency_gap_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=3000",
    "--dump-dom",
]  # fmt: skip
# Hovers over the first point's measurement and writes down where the labels stand.
PROBE = """<script>addEventListener("load", () => {
  Plotly.Fx.hover("efficiency-gap", [{curveNumber: 0, pointNumber: 1}], "x2y2");
  const boxes = [...document.querySelectorAll(".textpoint text")].map((text) => text.getBoundingClientRect());
  document.body.dataset.boxes = JSON.stringify(boxes.filter((box) => box.width));
});</script></body>"""


def point(model: str, family: str, top1: float | None, ms: float | None, fused: bool = False, own: float | None = None):
    measured = Measurement(model, 224, 128, "float16", ms, "inductor", "a test", fused) if ms else None
    run = Accuracy(model, family, 224, own, "a run") if own else None
    return Point(Accuracy(model, family, 224, top1, "a paper"), 4 * 10**9, 989e12, measured, run)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on the PATH")
def test_page_in_chromium(tmp_path):
    points = [
        point("convnext_tiny", "ConvNeXt", 82.1, 2.8, fused=True, own=81.9),
        point("convnext_tiny", "ConvNeXt", 82.1, 7.5, own=81.9),
        point("resnet101", "ResNet", 81.89, 7.4),
        point("resnet152", "ResNet", 82.29, None),
        point("convfirst_tiny", "ConvFirst", None, 1.8, fused=True),
    ]
    page = tmp_path / "page.html"
    write_efficiency_gap_page(points, "A < title\nand more", page)
    page.write_text(page.read_text().replace("</body>", PROBE))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    dom = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)  # less Plotly's own source

    assert "CONSOLE" not in done.stderr  # where an error of a script would be
    assert dom.startswith('<!DOCTYPE html>\n<html lang="en">') and "<title>A &lt; title</title>" in dom
    assert dom.count('class="trace scatter') == 7  # the five, and two at the run's own accuracy
    assert dom.count('<path class="point"') == 2 * 7 - 1  # ideal and measured, but for the one that wasn't
    labels = {unescape(text).strip() for text in re.findall(r'data-unformatted="([^"]+)"', dom)}
    assert {"convnext_tiny, fused", "convnext_tiny, fused (own run)", "convnext_tiny, Inductor", "resnet152"} <= labels
    legend = re.findall(r'class="legendtext"[^>]*>([^<]+)<', dom)
    assert sorted(legend) == ["ConvFirst", "ConvNeXt", "ResNet"]
    hover = re.search(r'<g class="hovertext".*?</g>', dom, re.DOTALL)[0]
    assert "resnet101" in hover and "measured 57.8 µs" in hover
    boxes = json.loads(unescape(re.search(r'data-boxes="([^"]+)"', dom)[1]))
    assert len(boxes) == 7
    for i, box in enumerate(boxes):
        for other in boxes[:i]:
            apart = (
                box["right"] <= other["left"]
                or other["right"] <= box["left"]
                or box["bottom"] <= other["top"]
                or other["bottom"] <= box["top"]
            )
            assert apart, (box, other)
