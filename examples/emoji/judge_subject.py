"""Whether a picture shows the subject: a logistic regression on the judge's features, fitted on renderings only.

python -m examples.emoji.judge_subject            # writes assets/judge/subject.safetensors, a few minutes on a CPU
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from .concepts import CONCEPT_INDEX
from .data import Renderer
from .judge import Judge, load_judge
from .render import concept_sprites
from .styles import STYLE_FUNCTIONS
from .subject import CLASS, SIBLINGS, creature, subject_pictures
from .train_vae import round_trip


class SubjectJudge:
    """Pictures in [0, 1], (B, 3, 128, 128) -> whether each shows the subject, bool (B,)."""

    def __init__(self, judge: Judge, weight: Tensor, bias: Tensor) -> None:
        self._judge, self._weight, self._bias = judge, weight, bias

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        return features(self._judge, pictures) @ self._weight + self._bias > 0


def load_subject_judge(folder: Path) -> SubjectJudge:
    """From `judge.safetensors` and `subject.safetensors` in a folder."""
    head = load_file(folder / "subject.safetensors")
    return SubjectJudge(load_judge(folder / "judge.safetensors"), head["weight"], head["bias"])


@torch.no_grad()
def features(judge: Judge, pictures: Tensor) -> Tensor:
    """Mean and maximum over the picture after each stage of the trunk, (B, 656)."""
    parts, now = [], 4 * pictures - 2
    for layer in judge.trunk:
        now = layer(now)
        if not isinstance(layer, torch.nn.Conv2d | torch.nn.BatchNorm2d | torch.nn.SiLU):
            parts += [now.mean((2, 3)), now.amax((2, 3))]
    return torch.cat(parts, dim=1)


def examples(renderer: Renderer, vae: AutoencoderKL, count: int) -> tuple[Tensor, Tensor]:
    """About `count` renderings and whether they show the subject; half after the autoencoder's round trip.

    The subject plain and in every style, its siblings, its class and all concepts, plain and in every style.
    """
    share = count // 10
    backgrounds = [renderer.integers(share, 16) for _ in range(8)]
    own = [subject_pictures(creature(), b, renderer.generator) for b in backgrounds[:4]]
    own = [own[0], *(style(p, renderer.generator) for p, style in zip(own[1:], STYLE_FUNCTIONS.values(), strict=True))]
    siblings = [
        subject_pictures(creature(look), b, renderer.generator)
        for look, b in zip(SIBLINGS, torch.cat(backgrounds[4:7]).chunk(len(SIBLINGS)), strict=True)
    ]
    aliens = torch.full((share // 2,), CONCEPT_INDEX[CLASS], device=renderer.device)
    others = [renderer.any_pair(2 * share, 0.8).pictures]
    others += [renderer.draw(aliens, renderer.integers(share // 2, 16), torch.zeros_like(aliens)).pictures]
    others += [renderer.styled(share // 2, style).pictures for style in STYLE_FUNCTIONS]
    pictures = torch.cat([*own, *siblings, *others])
    shown = torch.zeros(len(pictures))
    shown[: sum(map(len, own))] = 1
    half = torch.arange(len(pictures)) % 2 == 0
    pictures[half] = torch.cat([round_trip(vae, part) for part in pictures[half].split(64)])
    return pictures, shown


def fit(inputs: Tensor, shown: Tensor, steps: int = 200) -> tuple[Tensor, Tensor]:
    """Logistic regression with a little weight decay, by L-BFGS: weight (features,) and bias ()."""
    mean, spread = inputs.mean(0), inputs.std(0) + 1e-6
    scaled = (inputs - mean) / spread
    weight, bias = torch.zeros(inputs.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(scaled @ weight + bias, shown) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return weight / spread, bias - (weight / spread * mean).sum()


def rates(judge: SubjectJudge, pictures: Tensor, shown: Tensor) -> dict[str, float]:
    """How often the judge is right on pictures with and without the subject."""
    said = torch.cat([judge(part) for part in pictures.split(64)])
    right = {"with": said[shown > 0], "without": ~said[shown == 0]}
    return {name: round(float(part.float().mean()), 4) for name, part in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--count", type=int, default=2000)
    args = parser.parse_args()
    judge = load_judge(args.assets / "judge" / "judge.safetensors")
    vae = AutoencoderKL.from_pretrained(args.assets / "emoji-diffusion" / "vae").eval()
    sprites = concept_sprites()
    pictures, shown = examples(Renderer(sprites, sprites[:1], seed=21), vae, args.count)
    weight, bias = fit(torch.cat([features(judge, part) for part in pictures.split(64)]), shown)
    save_file({"weight": weight, "bias": bias}, args.assets / "judge" / "subject.safetensors")
    fresh = examples(Renderer(sprites, sprites[:1], seed=22), vae, args.count // 2)
    print(json.dumps(rates(load_subject_judge(args.assets / "judge"), *fresh)))


if __name__ == "__main__":
    main()
