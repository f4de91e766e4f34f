"""A pipeline that is saved while others draw with it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests import tiny


def test_save_pretrained_waits_for_those_who_switch(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    base = tiny.snapshot(pipe)
    pipe.load_shira(tiny.adapter_for(pipe, 1), "a", activate=False)
    with ThreadPoolExecutor(1) as pool:
        with pipe.shira("a"):
            saving = pool.submit(pipe.save_pretrained, tmp_path / "saved")
            with pytest.raises(TimeoutError):
                saving.result(timeout=1)
        saving.result(timeout=60)
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(weight, base[name]) for name, weight in tiny.snapshot(saved).items())
