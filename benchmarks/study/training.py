"""Training many adapters at once: each optimizer step is a CUDA graph, and several replay side by side.

Randomness is drawn before: for one seed all methods see the same pictures, captions, timesteps and noise in turn.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from benchmarks.study.flat import Layout
from benchmarks.study.masks import Gradients
from benchmarks.study.recipes import Recipe
from benchmarks.study.world import Lesson, World
from examples.emoji.model import build_scheduler

DROPPED_CAPTIONS = 0.3
BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Draws:
    """What chance decides, step by step, ``[steps, ...]`` each."""

    picture: Tensor  # (steps, B) in [0, 1): which of a lesson's
    flipped: Tensor  # (steps, B) int64, 0 or 1
    dropped: Tensor  # (steps, B) bool: the caption is left out
    time: Tensor  # (steps, B) int64
    noise: Tensor  # (steps, B, 4, 16, 16)
    other: Tensor  # (steps,) in [0, 1): which of the bank is beside
    strength: Tensor  # (steps,) in [0, 1]: how strong
    theirs: Tensor  # (steps, B) bool: the additive loss looks at a picture of the other

    @classmethod
    def make(cls, seed: int, steps: int, batch: int, device: torch.device) -> "Draws":
        own = torch.Generator().manual_seed(1_000_003 * (seed + 1))

        def integers(high: int) -> Tensor:
            return torch.randint(high, (steps, batch), generator=own)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=own)

        drawn = cls(
            uniform(steps, batch),
            integers(2),
            uniform(steps, batch) < DROPPED_CAPTIONS,
            integers(1000),
            torch.randn((steps, batch, 4, 16, 16), generator=own),
            uniform(steps),
            uniform(steps),
            uniform(steps, batch) < 0.5,
        )
        return cls(*(getattr(drawn, field.name).to(device) for field in fields(cls)))

    def at(self, step: Tensor) -> "Draws":
        """Those of one step, int64 ``[1]``."""
        return Draws(*(getattr(self, field.name).index_select(0, step)[0] for field in fields(self)))

    def of(self, latents: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """The latents and texts that are drawn from a lesson's."""
        which = (self.picture * len(texts)).long()
        return latents[self.flipped, which], texts[which]

    def copy_(self, other: "Draws") -> None:
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))


@dataclass(frozen=True)
class Bank:
    """Who may be active while an adapter trains: changes ``[k, numel]`` and their lessons."""

    changes: Tensor
    latents: Tensor  # (k, 2, pictures, 4, 16, 16)
    texts: Tensor  # (k, pictures, 32, width)


class Objective:
    """The losses over one base; the only place where a UNet is called in training."""

    def __init__(self, world: World, layout: Layout, weights: Tensor) -> None:
        self.unet, self.layout, self.weights = world.parts.unet, layout, weights
        self.empty = world.text([""])
        self._scheduler = build_scheduler()
        self._scheduler.alphas_cumprod = self._scheduler.alphas_cumprod.to(world.device)

    def predict(self, weights: Tensor, noisy: Tensor, times: Tensor, texts: Tensor) -> Tensor:
        return functional_call(self.unet, self.layout.views(weights), (noisy, times, texts)).sample

    def noised(self, latents: Tensor, texts: Tensor, draw: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, the v to predict, and texts with some left out."""
        times = draw.time
        noisy = self._scheduler.add_noise(latents, draw.noise, times)
        target = self._scheduler.get_velocity(latents, draw.noise, times)
        return noisy, target, torch.where(draw.dropped[:, None, None], self.empty, texts)

    def picture_loss(self, weights: Tensor, latents: Tensor, texts: Tensor, draw: Draws) -> Tensor:
        noisy, target, texts = self.noised(*draw.of(latents, texts), draw)
        return F.mse_loss(self.predict(weights, noisy, draw.time, texts), target)

    def additive_loss(self, change: Tensor, other: Tensor, latents: Tensor, texts: Tensor, draw: Draws) -> Tensor:
        """How far the effect of `change` beside `other` is from its effect alone; latents are already chosen."""
        noisy, _, texts = self.noised(latents, texts, draw)
        with torch.no_grad():
            alone, theirs, neither = (
                self.predict(self.weights + part, noisy, draw.time, texts)
                for part in (change.detach(), other, torch.zeros_like(other))
            )
        both = self.predict(self.weights + other + change, noisy, draw.time, texts)
        return F.mse_loss(both, theirs + alone - neither)


def gradients(objective: Objective, lesson: Lesson, draws: Draws) -> Gradients:
    """Sums over the calibration set."""
    weights = objective.weights.clone().requires_grad_(True)
    magnitude, signed = torch.zeros_like(objective.weights), torch.zeros_like(objective.weights)
    for i in range(len(draws.time)):
        draw = draws.at(torch.tensor([i], device=weights.device))
        loss = objective.picture_loss(weights, lesson.latents, lesson.texts, draw)
        (gradient,) = torch.autograd.grad(loss, weights)
        magnitude += gradient.abs()
        signed += gradient
    return Gradients(magnitude, signed)


class Slot:
    """One adapter in training. Its tensors keep their places, so that one recorded step serves many adapters.

    `load` begins another adapter of the same `shape_of` recipe; `step` does one optimizer step.
    """

    def __init__(
        self, objective: Objective, recipe: Recipe, lesson: Lesson, draws: Draws, bank: Bank | None, capacity: int
    ) -> None:
        self.objective, self.recipe, self.bank = objective, recipe, bank
        device = objective.weights.device
        self._chosen = objective.layout.chosen(objective.unet, recipe.targets)
        self._shapes = _lora_shapes(objective.layout, self._chosen, recipe.rank)
        count = sum(a + b for a, b in self._shapes) if recipe.kind == "lora" else capacity
        zeros = torch.zeros(count, device=device)
        self.theta = zeros.clone().requires_grad_(True)
        self._mean, self._square, self._average = zeros.clone(), zeros.clone(), zeros.clone()
        self.indices = torch.full((capacity,), objective.layout.numel, device=device)
        self.units = torch.ones(capacity, device=device)
        self._latents, self._texts = lesson.latents.clone(), lesson.texts.clone()
        self._draws = Draws(*(getattr(draws, field.name).clone() for field in fields(Draws)))
        self._at = torch.zeros(1, dtype=torch.long, device=device)
        self._rate, self._decay, self._smooth = (torch.zeros(1, device=device) for _ in range(3))
        progress = torch.arange(recipe.steps, device=device) / recipe.steps
        self._curve = 0.5 * (1 + torch.cos(math.pi * progress))
        self.losses = torch.zeros(recipe.steps, device=device)
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self._graph: Any = None

    @torch.no_grad()
    def load(self, recipe: Recipe, lesson: Lesson, draws: Draws, indices: Tensor | None, seed: int) -> None:
        """Begin an adapter; `indices` of a SHiRA."""
        if indices is None:
            self.theta.copy_(_lora_start(self._shapes, self.objective.layout, self._chosen, recipe.rank, seed))
        else:
            self.theta.zero_()
            self.indices.fill_(self.objective.layout.numel)
            self.indices[: indices.numel()] = indices
            self.units.fill_(1.0)
            if recipe.relative:
                self.units[: indices.numel()] = _units(self.objective)[indices]
        for state in (self._mean, self._square, self._average, self._at, self.losses):
            state.zero_()
        self._rate.fill_(recipe.rate)
        self._decay.fill_(recipe.decay)
        self._smooth.fill_(recipe.smooth)
        self._latents.copy_(lesson.latents)
        self._texts.copy_(lesson.texts)
        self._draws.copy_(draws)

    def change(self, theta: Tensor) -> Tensor:
        """What is trained -> the change of all weights, ``[numel]``."""
        layout = self.objective.layout
        if self.recipe.kind == "lora":
            return _lora_change(theta, self._shapes, layout, self._chosen, self.recipe.rank)
        beyond = torch.zeros(layout.numel + 1, device=theta.device)  # one more, where padding goes
        return beyond.index_add(0, self.indices, theta * self.units)[: layout.numel]

    def result(self) -> Tensor:
        """The change of all weights that the training ends with, ``[numel]``."""
        return self.change(self._average if self.recipe.average else self.theta).detach().clone()

    def loss(self, theta: Tensor, draw: Draws) -> Tensor:
        if self.recipe.dropout:
            theta = F.dropout(theta, self.recipe.dropout)
        change, weights, recipe = self.change(theta), self.objective.weights, self.recipe
        if self.bank is None:
            return self.objective.picture_loss(weights + change, self._latents, self._texts, draw)
        count = len(self.bank.changes)
        which = (draw.other * count).long().clamp(max=count - 1).view(1)
        other = self.bank.changes.index_select(0, which)[0] * draw.strength
        under = weights + other if recipe.under else weights
        loss = self.objective.picture_loss(under + change, self._latents, self._texts, draw)
        if recipe.additive:
            theirs = draw.of(*(part.index_select(0, which)[0] for part in (self.bank.latents, self.bank.texts)))
            own, side = draw.of(self._latents, self._texts), draw.theirs
            latents = torch.where(side[:, None, None, None], theirs[0], own[0])
            texts = torch.where(side[:, None, None], theirs[1], own[1])
            loss = loss + recipe.additive * self.objective.additive_loss(change, other, latents, texts, draw)
        return loss

    def _step(self) -> None:
        draw = self._draws.at(self._at)
        loss = self.loss(self.theta, draw)
        (gradient,) = torch.autograd.grad(loss, self.theta)
        if self.recipe.sharpness:
            ascent = self.theta.detach() + self.recipe.sharpness * gradient / (gradient.norm() + 1e-12)
            there = ascent.requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.loss(there, draw), there)
        with torch.no_grad():
            self._adam(gradient, loss.detach())

    def _adam(self, gradient: Tensor, loss: Tensor) -> None:
        gradient = gradient * (1.0 / (gradient.norm() + 1e-6)).clamp(max=1.0)
        self.losses.index_add_(0, self._at, loss.view(1))
        rate = self._rate * self._curve.index_select(0, self._at)
        self._at += 1
        self._mean.lerp_(gradient, 1 - BETAS[0])
        self._square.lerp_(gradient.square(), 1 - BETAS[1])
        mean = self._mean / (1 - BETAS[0] ** self._at)
        root = (self._square / (1 - BETAS[1] ** self._at)).sqrt()
        self.theta.mul_(1 - rate * self._decay).sub_(rate * mean / (root + self._smooth * root.mean() + 1e-8))
        late = (self._at - self.recipe.steps // 2).clamp(min=0)
        self._average.lerp_(self.theta, (late > 0) / late.clamp(min=1))

    def record(self) -> None:
        """Record a step as a CUDA graph; call after `load`, and `load` again before training."""
        if self.stream is None or self._graph is not None:
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self.stream):
            self._step()

    def step(self) -> None:
        if self._graph is None:
            self._step()
            return
        with torch.cuda.stream(self.stream):
            self._graph.replay()


def train(slots: list[Slot], steps: int) -> None:
    """Train what the slots hold, side by side on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    for _ in range(steps):
        for slot in slots:
            slot.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _units(objective: Objective) -> Tensor:
    """Each weight's standard deviation over the mean of all, entry by entry."""
    spreads = torch.stack([part.std() for part in objective.weights.split(objective.layout.sizes)])
    sizes = torch.tensor(objective.layout.sizes, device=spreads.device)
    return (spreads / spreads.mean()).nan_to_num(1.0).repeat_interleave(sizes)


def _lora_shapes(layout: Layout, chosen: list[bool], rank: int) -> list[tuple[int, int]]:
    """Sizes of A ``(rank, in)`` and B ``(out, rank)`` of each chosen weight; norms and biases have no A."""
    shapes = [shape for shape, wanted in zip(layout.shapes, chosen, strict=True) if wanted]
    return [(rank * shape[1:].numel(), shape[0] * rank) if len(shape) > 1 else (0, shape[0]) for shape in shapes]


def _lora_start(shapes: list[tuple[int, int]], layout: Layout, chosen: list[bool], rank: int, seed: int) -> Tensor:
    """As PEFT begins: A by Kaiming with a = sqrt(5), B zero."""
    own = torch.Generator().manual_seed(seed)
    parts = []
    for size_a, size_b in shapes:
        bound = (rank / max(1, size_a)) ** 0.5  # 1 / sqrt(inputs)
        parts += [(2 * torch.rand(size_a, generator=own) - 1) * bound, torch.zeros(size_b)]
    return torch.cat(parts)


def _lora_change(theta: Tensor, shapes: list[tuple[int, int]], layout: Layout, chosen: list[bool], rank: int) -> Tensor:
    pieces = iter(theta.split([size for pair in shapes for size in pair]))
    parts = []
    for shape, wanted in zip(layout.shapes, chosen, strict=True):
        if not wanted:
            parts.append(torch.zeros(shape.numel(), device=theta.device))
            continue
        down, up = next(pieces), next(pieces)
        parts.append(up if len(shape) == 1 else (up.view(shape[0], rank) @ down.view(rank, -1)).flatten())
    return torch.cat(parts)
