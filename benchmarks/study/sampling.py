"""Pictures from any mix of changes, and what the judge says of them; on a GPU all from recorded graphs.

A mix is a schedule: for each step the passes through the UNet, each under its own weights and with its own share in
the velocity. One pass under a sum of changes is the ordinary mix; several passes are guidance composed of adapters.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.study.flat import Layout, bind
from benchmarks.study.world import Prompts, World
from examples.emoji.evaluate import GUIDANCE
from examples.emoji.judge_mixes import MixJudge
from examples.emoji.model import build_scheduler


@dataclass(frozen=True)
class Pass:
    """One call of the UNet: the change of its weights, and the shares of its two halves in the velocity."""

    change: Tensor | None  # [numel]; None is the base
    prompted: float = GUIDANCE
    empty: float = 1 - GUIDANCE


Schedule = Callable[[int, int], Sequence[Pass]]
"""``schedule(step, steps)``: the passes of one step."""


@dataclass(frozen=True)
class Verdict:
    """What the judge says: concept right ``[n]`` bool, and each sight's logit ``[n, 7]``."""

    concept: Tensor
    sights: Tensor


class Sampler:
    """Draws `count` pictures at a time and judges them."""

    def __init__(self, world: World, layout: Layout, weights: Tensor, judge: MixJudge, count: int, steps: int) -> None:
        device = world.device
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self._weights, self._scaling = weights, world.scaling
        self._unet = copy.deepcopy(world.parts.unet).to(self.dtype)
        self._live = weights.to(self.dtype, copy=True)
        bind(self._unet, layout, self._live)
        self._vae, self._judge = world.parts.vae, judge
        self._empty = world.text([""]).to(self.dtype)
        width = self._empty.shape[-1]
        self._noisy = torch.zeros(2 * count, 4, 16, 16, device=device, dtype=self.dtype)
        self._texts = torch.zeros(2 * count, 32, width, device=device, dtype=self.dtype)
        self._time = torch.zeros(2 * count, dtype=torch.long, device=device)
        self.latents = torch.zeros(count, 4, 16, 16, device=device)
        """Those of the pictures drawn last, scaled."""
        self.count = count
        scheduler = build_scheduler()
        scheduler.set_timesteps(steps)
        self._times = scheduler.timesteps.tolist()
        self._alphas = scheduler.alphas_cumprod.double()
        self._held: Tensor | None = weights
        self._call = _recorded(self._velocity, device)
        self._look = _recorded(self._judged, device)

    def _velocity(self) -> tuple[Tensor, ...]:
        return self._unet(self._noisy, self._time, self._texts, return_dict=False)[0].float().chunk(2)

    def _pictures(self) -> Tensor:
        with torch.autocast(self.latents.device.type, torch.bfloat16, enabled=self.latents.is_cuda):
            decoded = self._vae.decode(self.latents / self._scaling).sample
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def _judged(self) -> tuple[Tensor, ...]:
        pictures = self._pictures()
        return (*self._judge(pictures), pictures)

    def _wear(self, change: Tensor | None) -> None:
        """Write the weights of a pass, unless they are there."""
        if change is self._held:
            return
        self._live.copy_(self._weights if change is None else self._weights + change)
        self._held = change

    @torch.no_grad()
    def draw(self, prompts: Prompts, schedule: Schedule) -> tuple[Verdict, Tensor]:
        """The verdict and the pictures, ``[n, 3, 128, 128]`` in [0, 1]; `prompts` are `count` of them."""
        self._texts[: self.count].copy_(prompts.texts)
        self._texts[self.count :].copy_(self._empty.expand(self.count, -1, -1))
        latents = prompts.noise.clone()
        for step, time in enumerate(self._times):
            self._noisy.copy_(latents.repeat(2, 1, 1, 1))
            self._time.fill_(time)
            velocity = torch.zeros_like(latents)
            for one in schedule(step, len(self._times)):
                self._wear(one.change)
                prompted, empty = self._call()
                velocity += one.prompted * prompted + one.empty * empty
            latents = self._next(latents, velocity, step)
        self.latents.copy_(latents)
        concept, sights, pictures = self._look()
        return Verdict(concept.argmax(1) == prompts.concepts, sights.clone()), pictures

    def _next(self, latents: Tensor, velocity: Tensor, step: int) -> Tensor:
        """DDIM on v, as the pipeline's scheduler does it."""
        now = float(self._alphas[self._times[step]])
        later = float(self._alphas[self._times[step + 1]]) if step + 1 < len(self._times) else 1.0
        clean = now**0.5 * latents - (1 - now) ** 0.5 * velocity
        noise = now**0.5 * velocity + (1 - now) ** 0.5 * latents
        return later**0.5 * clean + (1 - later) ** 0.5 * noise


def _recorded(call: Callable[[], tuple[Tensor, ...]], device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """The same call from a CUDA graph, on a GPU; its results are overwritten by the next."""
    if device.type != "cuda":
        return call
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay
