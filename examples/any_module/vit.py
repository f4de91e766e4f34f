"""A tiny ViT that knows bright shapes learns to see dark ones, and those behind stripes.

One in four pictures of its pretraining is of these kinds: like a large model, the base has seen a little of
everything.

python -m examples.any_module.vit -o vit.json
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from examples.any_module.compare import Batch, Settings, Subject, Task, run

SIDE = 16
SETTINGS = Settings(base_steps=600, steps=200)
SHAPES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, y: torch.maximum(x.abs(), y.abs()) < 0.8,  # square
    lambda x, y: x**2 + y**2 < 1,  # disc
    lambda x, y: ((x**2 + y**2).sqrt() - 0.75).abs() < 0.25,  # ring
    lambda x, y: (torch.minimum(x.abs(), y.abs()) < 0.3) & (torch.maximum(x.abs(), y.abs()) < 1),  # plus
    lambda x, y: ((x.abs() - y.abs()).abs() < 0.35) & (x.abs() < 1),  # cross
    lambda x, y: (y.abs() < 0.9) & (x.abs() < 0.45 * (y + 1)),  # triangle
    lambda x, y: (x.abs() < 0.3) & (y.abs() < 1),  # upright bar
    lambda x, y: (y.abs() < 0.3) & (x.abs() < 1),  # lying bar
]


def pictures(*looks: Callable[[Tensor], Tensor]) -> Task:
    """Draw one shape a picture, of any size and place, in noise: ``(count, 1, side, side)`` around -1 to 1."""

    def draw(count: int, random: torch.Generator) -> Batch:
        labels = torch.randint(len(SHAPES), (count,), generator=random)
        radius = 3.5 + 2.5 * torch.rand(count, 1, 1, generator=random)
        centre = SIDE / 2 + 4 * torch.rand(2, count, 1, 1, generator=random) - 2.5
        steps = torch.arange(SIDE)
        x, y = (steps - centre[0]) / radius, (steps[:, None] - centre[1]) / radius
        x, y = torch.broadcast_tensors(x, y)  # (count, side, side) each
        every = torch.stack([shape(x, y) for shape in SHAPES])
        shapes = 2.0 * every[labels, torch.arange(count)] - 1
        noise = 0.2 * torch.randn(shapes.shape, generator=random)
        chosen = torch.randint(len(looks), (count,), generator=random)
        looking = torch.stack([look(shapes) for look in looks])[chosen, torch.arange(count)]
        return {"pixel_values": (looking + noise)[:, None], "labels": labels}

    return draw


def striped(shapes: Tensor) -> Tensor:
    return torch.where(torch.arange(SIDE) % 4 < 2, shapes, 1.0)


def scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.argmax(-1), labels


def vit(width: int = 64) -> Subject:
    config = ViTConfig(
        image_size=SIDE,
        patch_size=4,
        num_channels=1,
        num_labels=len(SHAPES),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    layers = ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]
    tasks = {"dark": pictures(torch.neg), "striped": pictures(striped)}
    return Subject(
        ViTForImageClassification(config), layers, pictures(*[torch.clone] * 6, torch.neg, striped), tasks, scores
    )


def main(argv: Sequence[str] | None = None) -> None:
    run(vit, SETTINGS, argv, __doc__)


if __name__ == "__main__":
    main()
