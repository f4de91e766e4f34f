"""Stage 6: how well the bundled style adapters do on concepts that none of their pictures shows.

python -m examples.emoji.evaluate_styles --each 1
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

import shira_diffusers  # noqa: F401  gives pipelines `load_shira`

from .captions import STYLES, caption, with_style
from .concepts import BACKGROUND_NAMES, CONCEPT_INDEX, CONCEPTS
from .data import Renderer
from .evaluate import generate, write_metrics
from .judge import Judge, load_judge
from .judge_styles import judge_style, true_rates, unseen_concepts
from .render import concept_sprites
from .sheet import contact_sheet


def prompts_for(concepts: list[str], style: str | None) -> list[str]:
    """One prompt a concept, on backgrounds in turn; with the style's name at the end, or without."""
    words = [
        caption(CONCEPTS[CONCEPT_INDEX[name]], BACKGROUND_NAMES[5 * i % len(BACKGROUND_NAMES)])
        for i, name in enumerate(concepts)
    ]
    return words if style is None else [with_style(text, style) for text in words]


def style_figures(pipe: Any, judge: Judge, renderer: Renderer, style: str, count: int, scale: float) -> dict[str, Any]:
    """Rates on `count` unseen concepts: as asked for, with the style's name in the prompt, and of true pictures."""
    concepts = unseen_concepts(style)
    concepts = concepts[:: max(1, len(concepts) // count)][:count]
    with pipe.shira(style, scale):
        figures = {
            kind: judge_style(judge, generate(pipe, prompts_for(concepts, name), seed=3_000, chunk=32), concepts, style)
            for kind, name in (("adapter", None), ("adapter_and_name", style))
        }
    true = true_rates(judge, pipe.vae, renderer, style, 256)
    share = round(figures["adapter"]["concept"] / true["concept"], 4)
    return {**figures, "true_pictures": true, "concept_relative_to_true": share}


@torch.no_grad()
def style_sheet(pipe: Any, names: list[str], scale: float) -> tuple[Tensor, list[str]]:
    """Rows of the base, each style, and all pairs at 0.8, at one seed a column."""
    concepts = ["owl", "rocket", "red apple", "violin", "turtle", "castle", "robot", "sunflower"]
    prompts = prompts_for(concepts, None)
    mixes: list[dict[str, float]] = [{}, *({name: scale} for name in names)]
    mixes += [{a: 0.8 * scale, b: 0.8 * scale} for i, a in enumerate(names) for b in names[i + 1 :]]
    pictures, labels = [], []
    for mix in mixes:
        with pipe.shira(list(mix), list(mix.values())):
            pictures.append(generate(pipe, prompts, seed=11, chunk=8))
        labels += [" + ".join(mix) or "base"] * len(prompts)
    return torch.cat(pictures), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--adapters", type=Path, help="folder of NAME.safetensors; default: adapters in --assets")
    parser.add_argument("--styles", nargs="+", default=list(STYLES))
    parser.add_argument("--count", type=int, default=400, help="unseen concepts a style, at most")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--sheet", type=Path, help="default: styles.png in --assets")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry", action="store_true", help="leave metrics.json as it is")
    args = parser.parse_args()
    pipe: Any = StableDiffusionPipeline.from_pretrained(args.assets / "emoji-diffusion").to(args.device)
    pipe.set_progress_bar_config(disable=True)
    for style in args.styles:
        pipe.load_shira((args.adapters or args.assets / "adapters") / f"{style}.safetensors", style, activate=False)
    judge = load_judge(args.assets / "judge" / "judge.safetensors", args.device)
    sprites = concept_sprites().to(args.device)
    renderer = Renderer(sprites, sprites[:1], seed=99)
    pictures, labels = style_sheet(pipe, args.styles, args.scale)
    contact_sheet(pictures, labels, 8, args.sheet or args.assets / "styles.png", colors=255)
    figures = {style: style_figures(pipe, judge, renderer, style, args.count, args.scale) for style in args.styles}
    if not args.dry:
        file = args.assets / "metrics.json"
        write_metrics(file, {"styles": json.loads(file.read_text()).get("styles", {}) | figures})
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
