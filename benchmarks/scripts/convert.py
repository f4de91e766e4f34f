"""How much of a LoRA survives as a SHiRA adapter: plain top entries against calibrated ones, judged on the demo model.

python -m benchmarks.scripts.convert
"""

import argparse
import math
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor

import shira_diffusers
from benchmarks.measure import ASSETS, Run, options
from examples.emoji.captions import STYLES
from examples.emoji.evaluate import generate
from examples.emoji.evaluate_styles import prompts_for
from examples.emoji.judge import load_judge
from examples.emoji.judge_styles import judge_style, unseen_concepts
from examples.emoji.model import build_scheduler
from shira_diffusers.cli.convert import calibration_of
from shira_diffusers.weights.targets import DEFAULT_TARGETS, PRESETS

RANK, RATE = 16, 2e-3
DROPPED_CAPTIONS = 0.1
DENSITIES = (0.02, 0.05, 0.1)
CALIBRATION_PROMPTS = 8


def main() -> None:
    parser = options(__doc__, {"cuda": 500, "cpu": 5000})
    parser.add_argument("--styles", nargs="+", default=list(STYLES))
    parser.add_argument("--count", type=int, default=128, help="pictures per row, each of a concept never trained")
    parser.add_argument("--steps", type=int, default=400, help="of training a LoRA")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    run = Run("convert", args, rank=RANK, rate=RATE, steps=args.steps, batch=args.batch)
    for style in args.styles:
        Trial(style, args).measure(run)


class Trial:
    """One style: its LoRA, and what the judge says of it and of its conversions."""

    def __init__(self, style: str, args: argparse.Namespace) -> None:
        self.style, self.args = style, args
        self.pipe: Any = StableDiffusionPipeline.from_pretrained(ASSETS / "emoji-diffusion", torch_dtype=torch.float32)
        self.pipe.to(args.device).set_progress_bar_config(disable=True)
        self.judge = load_judge(ASSETS / "judge" / "judge.safetensors", args.device)
        concepts = unseen_concepts(style)
        self.concepts = concepts[:: max(1, len(concepts) // args.count)][: args.count]
        self.references: dict[str, Tensor] = {}  # pictures of the base and of the LoRA itself
        self.captions = [file.read_text().strip() for file in sorted((ASSETS / "styles" / style).glob("*.txt"))]

    def measure(self, run: Run) -> None:
        """The base, the LoRA itself, each conversion, and the bundled adapter, which was trained at 2 %."""
        run.case(partial(self.rates, "base"), style=self.style, method="base")
        with tempfile.TemporaryDirectory() as folder:
            self.train(Path(folder))
            self.pipe.load_lora_weights(folder)
            run.case(partial(self.rates, "LoRA"), style=self.style, method="LoRA")
            self.pipe.unload_lora_weights()
            for given in self.cases():
                run.case(partial(self.converted, folder, **given), style=self.style, method="convert", **given)
        bundled = ASSETS / "adapters" / f"{self.style}.safetensors"
        run.case(lambda: self.with_adapter(bundled), style=self.style, method="trained adapter", density=0.02)

    def cases(self) -> Iterator[dict[str, Any]]:
        for density in DENSITIES[1:2] if self.args.toy else DENSITIES:
            for ranking, calibrated in product(("layer", "global"), (False, True)):
                yield {"density": density, "ranking": ranking, "calibrated": calibrated}

    def converted(self, folder: str, *, density: float, ranking: Any, calibrated: bool) -> dict[str, Any]:
        prompts = self.captions[:: len(self.captions) // CALIBRATION_PROMPTS][:CALIBRATION_PROMPTS]
        calibration = calibration_of(self.pipe, prompts) if calibrated else None
        found = shira_diffusers.convert_lora(folder, self.pipe, density, ranking=ranking, calibration=calibration)
        effect = found.adapter.metadata.get("effect_kept")
        kept = {"energy_kept": round(found.report.total.kept, 4)}
        return {**kept, **({"effect_kept": float(effect)} if effect else {}), **self.with_adapter(found.adapter)}

    def with_adapter(self, adapter: Any) -> dict[str, Any]:
        self.pipe.load_shira(adapter, "it")
        try:
            return self.rates()
        finally:
            self.pipe.unload_shira()

    def rates(self, keep: str = "") -> dict[str, Any]:
        """How often the judge sees the style, the concept, and both, in pictures of concepts never trained.

        ``picture_error``: mean squared difference from the LoRA's pictures of the same seeds, the base's being 1.
        """
        pictures = generate(self.pipe, prompts_for(self.concepts, None), seed=3_000, chunk=32)
        if keep:
            self.references[keep] = pictures
        figures: dict[str, Any] = judge_style(self.judge, pictures, self.concepts, self.style)
        figures["style_seen"] = figures.pop("style")
        if "LoRA" in self.references:
            lora, base = self.references["LoRA"], self.references["base"]
            error = (pictures - lora).square().mean() / (base - lora).square().mean()
            figures["picture_error"] = round(float(error), 4)
        return figures

    def train(self, folder: Path) -> None:
        """Train a LoRA of attention and feed-forward on the style's pictures, and save it as diffusers does."""
        torch.manual_seed(0)
        unet, device = self.pipe.unet, self.args.device
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(PRESETS[DEFAULT_TARGETS])))
        values = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(values, RATE, weight_decay=0.01)
        steps = 2 if self.args.toy else self.args.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / steps)))
        latents, texts = self.lesson()
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(latents, texts, device).backward()
            torch.nn.utils.clip_grad_norm_(values, 1.0)
            optimizer.step()
            schedule.step()
        StableDiffusionPipeline.save_lora_weights(folder, get_peft_model_state_dict(unet))
        unet.unload_lora()

    def loss(self, latents: Tensor, texts: Tensor, device: str) -> Tensor:
        """Of one batch drawn from latents ``(n, 4, 16, 16)`` and texts ``(n + 1, 32, width)``, the empty one last."""
        scheduler = build_scheduler()
        batch = self.args.batch
        which = torch.randint(len(latents), (batch,))
        dropped = torch.rand(batch) < DROPPED_CAPTIONS
        clean, noise = latents[which], torch.randn(batch, *latents.shape[1:]).to(device)
        times = torch.randint(1000, (batch,)).to(device)
        given = texts[torch.where(dropped, len(latents), which)]
        predicted = self.pipe.unet(scheduler.add_noise(clean, noise, times), times, given).sample
        return F.mse_loss(predicted, scheduler.get_velocity(clean, noise, times))

    @torch.no_grad()
    def lesson(self) -> tuple[Tensor, Tensor]:
        files = sorted((ASSETS / "styles" / self.style).glob("*.png"))
        pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().to(self.args.device) / 127.5 - 1
        latents = torch.cat([self.pipe.vae.encode(part).latent_dist.mean for part in pictures.split(32)])
        texts, _ = self.pipe.encode_prompt([*self.captions, ""], self.args.device, 1, False)
        return latents * self.pipe.vae.config.scaling_factor, texts


if __name__ == "__main__":
    main()
