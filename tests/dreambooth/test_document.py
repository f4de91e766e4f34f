"""The programs in docs/training.md run as they stand, and what they make can be loaded."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from shira_diffusers import load_adapter
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]


def error_of(unet: UNet2DConditionModel, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sample, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 32, generator=generator)
    return unet(sample, 10, text).sample.square().mean()


class Trainer:
    """One that knows nothing of adapters."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet

    def train(self) -> None:
        optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-3)
        error_of(self.unet, 0).backward()
        optimizer.step()


def test_the_loops_of_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = (ROOT / "docs" / "training.md").read_text()
    (own_loop,) = (code for code in programs(document) if "SparseTuner" in code)
    (other_trainer,) = (code for code in programs(document) if "trainer.train()" in code)
    for code in (own_loop, other_trainer):
        pipe = tiny.pipeline()
        base = tiny.snapshot(pipe)
        scope = {"pipe": pipe, "batches": (1, 2), "trainer": Trainer(pipe.unet)}
        exec(code, scope | {"loss": lambda seed, unet=pipe.unet: error_of(unet, seed)})
        changed = {name for name, weight in tiny.snapshot(pipe).items() if not torch.equal(weight, base[name])}
        assert bool(changed) == (code is other_trainer)
        fresh = tiny.pipeline()
        fresh.load_shira("my-style")
        assert fresh.list_shira() == {"default_0": ["unet"]}
        assert load_adapter("my-style").nnz > 0


def programs(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document, re.DOTALL)
