"""The whole recipe: autoencoder, judge, base model, figures. Run it again to go on where it stopped.

python -m examples.emoji.run --minutes 12        # on a GPU
python -m examples.emoji.run --toy --work /tmp/toy --assets /tmp/toy-assets   # every stage in a minute or two, on a CPU
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from .data import Renderer
from .evaluate import early_figures, evaluate, round_trip_sheet, split_other_emoji, write_metrics
from .judge import Judge, save_judge
from .judge_styles import write_style_pictures
from .model import Parts, build_parts, save_pipeline
from .render import concept_sprites
from .train_base import latent_set, train_base
from .train_judge import judge_pool, train_judge
from .train_vae import set_scaling_factor, train_vae, vae_pool

VAE_SHARE, JUDGE_SHARE = 0.4, 0.055


@dataclass(frozen=True)
class Plan:
    """How long and how large; one for a GPU, one for a trial run."""

    seconds: float
    vae_batch: int = 32
    vae_pool: int = 120_000
    judge_batch: int = 256
    judge_pool: int = 80_000
    base_batch: int = 256
    latents: int = 100_000
    rendered: int = 1024  # a figure
    each: int = 6  # generated pictures a concept


TOY = Plan(15, vae_batch=8, vae_pool=100, judge_batch=8, judge_pool=100, base_batch=8, latents=50, rendered=8, each=0)


def run(plan: Plan, work: Path, assets: Path, device: torch.device, until: str) -> None:
    """All stages, each skipped if its result is there; `until` names the last."""
    parts = build_parts(work / "tokenizer")
    seen, _ = split_other_emoji()
    renderer = Renderer(concept_sprites().to(device), seen.to(device), seed=1)
    vae = autoencoder_stage(plan, parts.vae, renderer, work)
    if until == "vae":
        return
    judge_stage(plan, vae, renderer, work, assets / "judge" / "judge.safetensors")
    if until == "judge":
        figures = early_figures(assets, vae, renderer, plan.rendered)
        round_trip_sheet(vae, renderer, work / "round_trips.png")
        print(json.dumps(figures, indent=1))
        return
    base_stage(plan, Parts(parts.tokenizer, parts.text_encoder, parts.unet, vae), renderer, work, assets)
    write_style_pictures(Renderer(concept_sprites(), seen[:1], seed=7), assets / "styles")
    figures = evaluate(
        assets, device=device.type, count=plan.rendered, each=plan.each, held_out=1000 if plan.each else 4
    )
    write_metrics(assets / "metrics.json", figures)
    print(json.dumps(figures, indent=2))


def autoencoder_stage(plan: Plan, vae: AutoencoderKL, renderer: Renderer, work: Path) -> AutoencoderKL:
    """Train the autoencoder, or load it."""
    if not (work / "vae").exists():
        pool = vae_pool(renderer, plan.vae_pool, chunk=min(500, plan.vae_pool))
        train_vae(vae, pool, VAE_SHARE * plan.seconds, work / "vae.pt", batch=plan.vae_batch)
        set_scaling_factor(vae, renderer)
        vae.save_pretrained(work / "vae")
    return AutoencoderKL.from_pretrained(work / "vae").to(renderer.device).eval().requires_grad_(False)


def judge_stage(plan: Plan, vae: AutoencoderKL, renderer: Renderer, work: Path, file: Path) -> None:
    """Train the judge, or leave it."""
    if not file.exists():
        pool = judge_pool(vae, renderer, plan.judge_pool, chunk=min(500, plan.judge_pool))
        judge = Judge()
        train_judge(judge, pool, JUDGE_SHARE * plan.seconds, work / "judge.pt", batch=plan.judge_batch)
        save_judge(judge, file)


def base_stage(plan: Plan, parts: Parts, renderer: Renderer, work: Path, assets: Path) -> None:
    """Train UNet and text encoder, and write the pipeline, or leave it."""
    folder = assets / "emoji-diffusion"
    if folder.exists():
        return
    chunk = min(1000, plan.latents)
    data = latent_set(parts.vae, parts.tokenizer, renderer, plan.latents, seed=3, chunk=chunk)
    seconds = (1 - VAE_SHARE - JUDGE_SHARE) * plan.seconds
    done = train_base(parts, data, seconds, work / "base.pt", batch=plan.base_batch)
    save_pipeline(parts, folder)
    write_metrics(assets / "metrics.json", {"training": {"steps": done.step, "losses": done.losses[::20]}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12, help="training time of all stages together")
    parser.add_argument("--work", type=Path, default=Path("outputs/emoji"), help="checkpoints")
    parser.add_argument("--assets", type=Path, default=Path("assets"), help="results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--until", choices=("vae", "judge", "end"), default="end", help="the last stage to run")
    parser.add_argument("--toy", action="store_true", help="a trial of every stage: seconds, not minutes")
    args = parser.parse_args()
    plan = TOY if args.toy else Plan(60 * args.minutes)
    run(plan, args.work, args.assets, torch.device(args.device), args.until)


if __name__ == "__main__":
    main()
