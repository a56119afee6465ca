"""scripts/analyse.py prints what it works out, and names what it can't."""

from pathlib import Path

import hydra
import pytest

from convfirst.app.analyse import analyse

CONFIGS = str(Path(__file__).parents[2] / "configs")


@pytest.fixture(autouse=True)
def _hydra():
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        yield


def compose(*overrides: str):
    return hydra.compose("analyse", overrides=["timm_model=convfirst_atto", "ceilings=datasheet", *overrides])


def test_blocks_and_sequences_are_shown(capsys, tmp_path):
    sequences = analyse(compose("batch=2", "image_size=64", f"picture={tmp_path / 'line.png'}"))
    shown = capsys.readouterr().out
    assert "stages.2.blocks.1: convolution" in shown and "Waterline 295 FLOP/byte" in shown
    assert sequences["block_fused"].latency_s < sequences["compiled"].latency_s < sequences["layer_by_layer"].latency_s
    assert (tmp_path / "line.png").read_bytes().startswith(b"\x89PNG")


def row(text: str, name: str) -> list[str]:
    """Cells of the table's first row of that name."""
    (line, *_) = (line for line in text.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


@pytest.mark.parametrize(
    "name, gmacs, parameters",
    [
        ("resnet50", "4.09", "25.6"),  # torchvision's documentation: 4.09 G, 25.6 M
        ("efficientnet_b0", "0.386", "5.29"),  # the paper's table 2: 0.39 G, 5.3 M
        ("convnext_tiny", "4.46", "28.6"),  # ConvNeXt's README: 4.5 G, 28.6 M
        ("convfirst_tiny", "3.27", "20.3"),
        ("vgg19", "19.6", "144"),  # torchvision's documentation: 19.63 G, 143.7 M
        ("vit_small_patch16_224", "4.6", "22.1"),  # timm's results: 4.61 G, 22.05 M
        ("regnety_008", "0.797", "6.26"),  # RegNet's paper: 0.8 G, 6.3 M
    ],
)
def test_the_whole_models_work_is_shown(capsys, name, gmacs, parameters):
    analyse(compose(f"timm_model={name}", "show=layers", "dtype=bfloat16"))
    shown = capsys.readouterr().out
    assert shown.startswith(
        f"{name}: {gmacs} GMACs an image, {parameters} M parameters; "
        "batch 128, 224 x 224 pixels, bfloat16, on NVIDIA H100 SXM5 80GB\n"
    )
    whole = row(shown, "whole model")
    assert number(whole[1]) == pytest.approx(1e3 * float(gmacs), rel=0.005)
    assert number(whole[3]) == pytest.approx(2 * float(parameters), rel=0.02)  # MB of weights, with norms' buffers


@pytest.mark.parametrize("show", ["blocks", "layers", "layer_by_layer", "compiled", "block_fused"])
def test_rows_add_up_to_the_whole_model(capsys, show):
    sequences = analyse(compose("batch=2", "image_size=64", f"show={show}"))
    shown = capsys.readouterr().out
    rows = [line for line in shown.partition("kernel sequences")[0].splitlines() if line.startswith("│")]
    table = [[cell.strip() for cell in line.strip("│").split("│")] for line in rows]
    *parts, whole = table
    assert whole[0] == "whole model" and (parts[-1][0] == "outside the blocks, as compiled") == (show == "blocks")
    for column in (1, 2, 3, 6, 7):  # MMACs, MB, of them weights, least and lost time
        assert number(whole[column]) == pytest.approx(sum(number(part[column]) for part in parts), rel=0.01)
    line = sequences["block_fused" if show == "blocks" else show] if show != "layers" else None
    if line is not None:
        expected = [line.bytes / 1e6, line.weight_bytes / 1e6, line.intensity, line.depth]
        assert [number(cell) for cell in whole[2:6]] == pytest.approx(expected, rel=0.005)
        assert number(whole[7]) == pytest.approx(1e6 * line.lost_s, rel=0.005)


def test_how_far_under_water_a_kernel_is_and_what_that_costs(capsys):
    line = analyse(compose("batch=2", "image_size=64", "show=compiled"))["compiled"]
    shown = capsys.readouterr().out
    by_name = {time.kernel.name: time for time in line.times}
    for name in ("stages.0.blocks.0.expand: convolution", "stages.0.blocks.0.act: silu"):
        cells, time = row(shown, name), by_name[name]
        assert number(cells[5]) == pytest.approx(time.depth, rel=0.005)
        assert number(cells[7]) == pytest.approx(1e6 * time.lost_s, rel=0.005)
    assert row(shown, "stages.0.blocks.0.act: silu")[5] == "inf"  # it has no multiply-adds
    assert "Depth: the waterline over FLOP/byte" in shown
    cells = row(shown, "compiled")
    assert number(cells[4]) == pytest.approx(line.bytes / 1e9, rel=0.005)
    assert number(cells[7]) == pytest.approx(1e3 * line.lost_s, rel=0.005)


def test_a_model_without_residual_blocks_says_so(capsys):
    analyse(compose("timm_model=vgg11", "image_size=64"))
    shown = capsys.readouterr().out
    assert "vgg11: no residual blocks; try show=layers\n" in shown
    assert "each as one kernel" not in shown and "block_fused" in shown


def test_what_a_model_computes_in_another_dtype_is_said(capsys):
    analyse(compose("timm_model=vit_tiny_patch16_224"))
    shown = capsys.readouterr().out
    assert "24 of 74 convolutions and matrix products (0.179 GMACs an image) are in float32" in shown
    assert "their arithmetic is taken at the rate of float16." in shown
    analyse(compose("timm_model=vit_tiny_patch16_224", "dtype=float32"))
    assert "convolutions and matrix products" not in capsys.readouterr().out


def test_a_dtype_that_was_not_measured_is_said(capsys):
    analyse(compose("image_size=64", "ceilings=null", "device=a100", "dtype=bfloat16"))
    assert "80GB SXM column, dense; no measured bfloat16 for device=a100." in capsys.readouterr().out


def test_a_model_that_cannot_be_traced_is_named_with_the_cause():
    message = r"timm_model='vit_tiny_patch16_224' can't be traced with batch=128, image_size=256 \(its own is 224\): "
    with pytest.raises(ValueError, match=message + r"AssertionError: Input height \(256\)") as error:
        analyse(compose("timm_model=vit_tiny_patch16_224", "image_size=256"))
    assert isinstance(error.value.__cause__, AssertionError)


@pytest.mark.parametrize(
    "override, message",
    [
        ("show=modules", "show='modules' is unknown; accepted: blocks, layers, layer_by_layer, compiled, block_fused"),
        ("dtype=int8", "dtype='int8' is unknown; accepted: float16"),
        ("timm_model=convlast", "timm_model='convlast' is unknown to timm"),
        ("device=k80", "device='k80' is unknown; accepted: a100"),
        ("batch=0", "batch=0 must be at least 1"),
    ],
)
def test_what_is_unknown_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        analyse(compose(override))
