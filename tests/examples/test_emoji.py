"""The demo model is read by old versions of transformers too."""

from pathlib import Path

import pytest
from safetensors import safe_open

from examples.emoji.model import load_parts, save_pipeline
from tests import tiny

DEMO = Path(__file__).parents[2] / "assets" / "emoji-diffusion"


@pytest.mark.parametrize("saved_anew", [False, True], ids=["shipped", "saved anew"])
def test_the_text_encoder_has_the_keys_of_all_checkpoints(saved_anew: bool, tmp_path: Path) -> None:
    """Without ``text_model.``, transformers before 5.6 leaves its weights random, with a warning."""
    folder = DEMO
    if saved_anew:
        parts = load_parts(DEMO)
        save_pipeline(parts, folder := tmp_path)
        tiny.assert_same_bits(load_parts(folder).text_encoder, tiny.snapshot(load_parts(DEMO).text_encoder))
    with safe_open(folder / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118  no mapping
