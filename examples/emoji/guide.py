"""The pictures of docs/training.md: strengths of the bundled adapters, and a run's checkpoints.

python -m examples.emoji.guide --run outputs/blorp     # a run of the subject that kept its checkpoints
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

import shira_diffusers  # noqa: F401  gives pipelines `load_shira`
from shira_diffusers.dreambooth.checkpoints import list_checkpoints

from .evaluate import generate
from .sheet import contact_sheet
from .subject import words

STRENGTHS = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
ROWS = {
    "bluefire": "a picture of an owl on an orange background",
    "gold": "a picture of a teapot on a cyan background",
    "blorp": words("green"),
}


@torch.no_grad()
def strengths(pipe: Any, adapters: Path, file: Path) -> None:
    """A row an adapter, a column a strength, each row at one seed."""
    pictures, labels = [], []
    for name, prompt in ROWS.items():
        pipe.load_shira(adapters / f"{name}.safetensors", name)
        for strength in STRENGTHS:
            pipe.set_shira(name, strength)
            pictures.append(generate(pipe, [prompt], seed=11))
            labels.append(f"{name} {strength:g}")
        pipe.delete_shira(name)
    contact_sheet(torch.cat(pictures), labels, len(STRENGTHS), file, colors=255)


@torch.no_grad()
def checkpoints(pipe: Any, run: Path, file: Path) -> None:
    """A row a checkpoint: the subject on four new backgrounds, then its class without the token on the same."""
    places = ("green", "navy", "red", "lime")
    pictures, labels = [], []
    for checkpoint in list_checkpoints(run):
        pipe.load_shira(checkpoint, "it")
        prompts = [words(name) for name in places] + [words(name, "") for name in places]
        pictures.append(generate(pipe, prompts, seed=11))
        labels += [checkpoint.name] * len(prompts)
        pipe.delete_shira("it")
    contact_sheet(torch.cat(pictures), labels, 2 * len(places), file, colors=255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    pipe: Any = StableDiffusionPipeline.from_pretrained(args.assets / "emoji-diffusion")
    pipe.set_progress_bar_config(disable=True)
    strengths(pipe, args.assets / "adapters", args.docs / "strengths.png")
    checkpoints(pipe, args.run, args.docs / "checkpoints.png")


if __name__ == "__main__":
    main()
