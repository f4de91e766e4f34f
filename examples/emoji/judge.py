"""A small classifier that says what a picture shows: its concept, its background, its style."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .concepts import BACKGROUNDS, CONCEPTS
from .data import STYLE_LABELS

AnyJudge = TypeVar("AnyJudge", bound=nn.Module)

HEADS: dict[str, int] = {"concept": len(CONCEPTS), "background": len(BACKGROUNDS), "style": len(STYLE_LABELS)}


class Judge(nn.Module):
    """Pictures in [0, 1], (B, 3, 128, 128) -> probabilities by head: concept, background, style, (B, classes) each."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 152)) -> None:
        super().__init__()
        stem = nn.Conv2d(3, widths[0], 5, stride=2, padding=2, bias=False)
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(widths[0]), nn.SiLU()]
        for narrow, wide in itertools.pairwise(widths):
            layers += [_Block(narrow, wide, 2), _Block(wide, wide, 1)]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(2 * widths[-1], classes) for name, classes in HEADS.items()})

    def logits(self, pictures: Tensor) -> dict[str, Tensor]:
        """Before the softmax, by head."""
        features = self.trunk(4 * pictures - 2)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1)
        return {name: head(pooled) for name, head in self.heads.items()}

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Probabilities, by head."""
        return {name: logits.float().softmax(1) for name, logits in self.logits(pictures).items()}


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(narrow, wide, 3, stride, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.SiLU(),
            nn.Conv2d(wide, wide, 3, 1, 1, bias=False),
            nn.BatchNorm2d(wide),
        )
        same = narrow == wide and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(narrow, wide, 1, stride, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return F.silu(self.body(features) + self.shortcut(features))


def save_judge(judge: nn.Module, file: Path) -> None:
    """Write the weights of any judge in float16."""
    file.parent.mkdir(parents=True, exist_ok=True)
    state: Mapping[str, Tensor] = judge.state_dict()
    save_file({name: value.half().contiguous() for name, value in state.items() if value.is_floating_point()}, file)


def load_judge(file: Path | str, device: str | torch.device = "cpu") -> Judge:
    """A judge in float32, ready to use."""
    return load_weights(Judge(), file, device)


def load_weights(judge: AnyJudge, file: Path | str, device: str | torch.device) -> AnyJudge:
    """Read what `save_judge` wrote into a judge of the same kind, and return it ready to use."""
    judge.load_state_dict(load_file(str(file)), strict=False)  # without BatchNorm's counters of batches
    return judge.to(device).eval().requires_grad_(False)
