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


@pytest.mark.parametrize(
    "override, message",
    [
        ("show=modules", "show='modules' is unknown; accepted: blocks, layers, layer_by_layer, compiled, block_fused"),
        ("dtype=int8", "dtype='int8' is unknown; accepted: float16"),
        ("timm_model=convlast", "timm_model='convlast' is unknown to timm"),
        ("device=k80", "device='k80' is unknown; accepted: a100"),
    ],
)
def test_what_is_unknown_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        analyse(compose(override))
