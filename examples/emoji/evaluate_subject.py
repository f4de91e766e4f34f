"""How well the subject was learned: on backgrounds that its pictures do not show, and not where it was not asked for.

python -m examples.emoji.evaluate_subject
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

import shira_diffusers  # noqa: F401  gives pipelines `load_shira`

from .captions import STYLES, caption
from .concepts import BACKGROUND_NAMES, CONCEPT_INDEX, CONCEPTS
from .evaluate import generate, predictions, write_metrics
from .judge import load_judge
from .judge_subject import SubjectJudge, load_subject_judge
from .sheet import contact_sheet
from .subject import CLASS, SHOWN_ON, TOKEN, words

SUBJECT = "blorp"
NEW_BACKGROUNDS = tuple(name for name in BACKGROUND_NAMES if name not in SHOWN_ON)


def shown(judge: SubjectJudge, pictures: Tensor) -> float:
    """The share of pictures with the subject."""
    return round(float(torch.cat([judge(part) for part in pictures.split(64)]).float().mean()), 4)


@torch.no_grad()
def subject_figures(pipe: Any, assets: Path, each: int, scale: float) -> dict[str, Any]:
    """Rates of the subject with its token, and of subject and class without; `each` pictures a background."""
    judge, classifier = load_subject_judge(assets / "judge"), load_judge(assets / "judge" / "judge.safetensors")
    backgrounds = [name for name in NEW_BACKGROUNDS for _ in range(each)]
    others = CONCEPTS[:: max(1, len(CONCEPTS) // len(backgrounds))][: len(backgrounds)]
    with pipe.shira(SUBJECT, scale):
        token = generate(pipe, [words(name) for name in backgrounds], seed=500, chunk=8)
        plain = generate(pipe, [words(name, "") for name in backgrounds], seed=500, chunk=8)
        rest = generate(pipe, [caption(c, b) for c, b in zip(others, backgrounds, strict=False)], seed=500, chunk=8)
    asked = torch.tensor([BACKGROUND_NAMES.index(name) for name in backgrounds])
    alien = predictions(classifier, plain)["concept"] == CONCEPT_INDEX[CLASS]
    named = predictions(classifier, rest)["concept"] == torch.tensor([CONCEPT_INDEX[c.name] for c in others])
    return {
        "with_token": {
            "subject": shown(judge, token),
            "background": _mean(predictions(classifier, token)["background"] == asked),
        },
        "class_without_token": {"subject": shown(judge, plain), "class": _mean(alien)},
        "other_concepts": {"subject": shown(judge, rest), "concept": _mean(named)},
        "pictures_each": len(backgrounds),
        "strength": scale,
    }


def _mean(right: Tensor) -> float:
    return round(float(right.float().mean()), 4)


@torch.no_grad()
def subject_sheet(pipe: Any, styles: tuple[str, ...], scale: float) -> tuple[Tensor, list[str]]:
    """Rows: the subject on new backgrounds, its class without the token, the subject in each style."""
    backgrounds = NEW_BACKGROUNDS[:8]
    rows: list[tuple[str, dict[str, float]]] = [(TOKEN, {SUBJECT: scale}), ("", {SUBJECT: scale})]
    rows += [(TOKEN, {SUBJECT: scale, style: 0.8}) for style in styles]
    pictures, labels = [], []
    for token, mix in rows:
        with pipe.shira(list(mix), list(mix.values())):
            pictures.append(generate(pipe, [words(name, token) for name in backgrounds], seed=11, chunk=8))
        labels += [" + ".join(mix) if token else f"{SUBJECT}, no token"] * len(backgrounds)
    return torch.cat(pictures), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--adapter", type=Path, help="default: adapters/blorp.safetensors in --assets")
    parser.add_argument("--each", type=int, default=4, help="pictures a background")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--sheet", type=Path, help="default: subject.png in --assets")
    parser.add_argument("--dry", action="store_true", help="leave metrics.json as it is")
    args = parser.parse_args()
    pipe: Any = StableDiffusionPipeline.from_pretrained(args.assets / "emoji-diffusion")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_shira(args.adapter or args.assets / "adapters" / f"{SUBJECT}.safetensors", SUBJECT, activate=False)
    for style in STYLES:
        pipe.load_shira(args.assets / "adapters" / f"{style}.safetensors", style, activate=False)
    contact_sheet(*subject_sheet(pipe, STYLES, args.scale), 8, args.sheet or args.assets / "subject.png", colors=255)
    figures = subject_figures(pipe, args.assets, args.each, args.scale)
    if not args.dry:
        write_metrics(args.assets / "metrics.json", {"subject": figures})
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
