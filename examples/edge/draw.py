"""Draw a picture with ONNX Runtime alone: no torch, no diffusers, no transformers.

shira export-onnx assets/emoji-diffusion exported --dtype fp16           # once, on a machine with torch
python -m examples.edge.draw exported "a picture of a red apple on a teal background" \\
    --adapter assets/adapters/bluefire.safetensors=0.8 -o apple.png

On the device: pip install onnxruntime tokenizers safetensors numpy pillow, and pip install --no-deps . in a clone.
Where torch is installed too, it is loaded by ``import shira_diffusers``, but takes no part.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from shira_diffusers import ShiraError
from shira_diffusers.edge import OnnxResident

Floats = NDArray[np.float32]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what shira export-onnx wrote")
    parser.add_argument("prompt")
    parser.add_argument("--adapter", action="append", default=[], metavar="FILE[=SCALE]", help="may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("-o", "--output", type=Path, default=Path("edge.png"))
    args = parser.parse_args(argv)
    start = time.perf_counter()
    resident = OnnxResident(args.folder)
    opened = time.perf_counter()
    mix = {}
    for number, given in enumerate(args.adapter):
        file, _, scale = given.partition("=")
        resident.add(file, name := f"{number}: {Path(file).stem}")
        mix[name] = float(scale or 1)
    added = time.perf_counter()
    resident.set(mix)
    switched = time.perf_counter()
    latents = first_latents(args.folder, args.seed)
    picture = draw(resident, args.folder, args.prompt, latents, steps=args.steps, guidance=args.guidance)
    drawn = time.perf_counter()
    Image.fromarray(picture).save(args.output)
    print(
        f"wrote {args.output}: opened in {opened - start:.2f} s, adapters read in {added - opened:.2f} s, switched in "
        f"{1000 * (switched - added):.1f} ms, drawn in {drawn - switched:.2f} s"
    )


def first_latents(folder: Path, seed: int) -> Floats:
    """Noise, ``(1, channels, height, width)``."""
    config = config_of(folder / "unet")
    shape = (1, config["in_channels"], config["sample_size"], config["sample_size"])
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def draw(
    resident: OnnxResident, folder: Path, prompt: str, latents: Floats, *, steps: int = 20, guidance: float = 3.0
) -> NDArray[np.uint8]:
    """Draw with the active mix.

    Args:
        resident: of ``folder``.
        latents: see ``first_latents``.

    Returns:
        The picture, ``(height, width, 3)``.
    """
    (text,) = resident.run("text_encoder", {"input_ids": tokenized(folder / "tokenizer", ["", prompt])})
    for step in denoising(config_of(folder / "scheduler", "scheduler_config"), steps):
        both = np.concatenate([latents, latents]).astype(text.dtype)
        times = np.full(2, step.time, np.int64)
        feeds = {"sample": both, "timestep": times, "encoder_hidden_states": text}
        without, towards = resident.run("unet", feeds)[0].astype(np.float32)
        latents = step.next(latents, without + guidance * (towards - without))
    scaled = (latents / config_of(folder / "vae")["scaling_factor"]).astype(text.dtype)
    (picture,) = resident.run("vae", {"latents": scaled})
    colours = (picture[0].astype(np.float32) / 2 + 0.5).clip(0, 1).transpose(1, 2, 0)
    return (colours * 255).round().astype(np.uint8)


def tokenized(folder: Path, prompts: list[str]) -> NDArray[np.int64]:
    """The token ids of prompts, ``(prompts, length)``, as CLIP's tokenizer pads and truncates them."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    length, pad = config["model_max_length"], config["pad_token"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    return np.array([each.ids for each in tokenizer.encode_batch(prompts)], np.int64)


class Step:
    """One step of DDIM (arXiv 2010.02502, equation 12, without noise).

    Args:
        time: of the training's noise schedule.
        kept, kept_next: the share of the picture's variance in the latents before and after the step.
        velocity: whether the model predicts velocity (arXiv 2202.00512) rather than noise.
    """

    def __init__(self, time: int, kept: float, kept_next: float, velocity: bool) -> None:
        self.time, self.kept, self.kept_next, self.velocity = time, kept, kept_next, velocity

    def next(self, latents: Floats, predicted: Floats) -> Floats:
        """The latents after the step; all ``(1, channels, height, width)``."""
        signal, noise = np.float32(self.kept**0.5), np.float32((1 - self.kept) ** 0.5)
        if self.velocity:
            picture, epsilon = signal * latents - noise * predicted, signal * predicted + noise * latents
        else:
            picture, epsilon = (latents - noise * predicted) / signal, predicted
        return np.float32(self.kept_next**0.5) * picture + np.float32((1 - self.kept_next) ** 0.5) * epsilon


def denoising(config: dict[str, Any], steps: int) -> Iterator[Step]:
    """The steps that diffusers' ``DDIMScheduler`` of this configuration takes."""
    known = {"beta_schedule": ("linear", "scaled_linear"), "timestep_spacing": ("leading", "trailing")}
    known |= {"prediction_type": ("epsilon", "v_prediction"), "clip_sample": (False,), "thresholding": (False,)}
    other = [f"{key}={config[key]!r}" for key, values in known.items() if config[key] not in values]
    if other:
        raise SystemExit(f"this script cannot sample with {', '.join(other)}; it knows {known}")
    count = config["num_train_timesteps"]
    power = 2 if config["beta_schedule"] == "scaled_linear" else 1
    betas = np.linspace(config["beta_start"] ** (1 / power), config["beta_end"] ** (1 / power), count) ** power
    kept = np.cumprod(1 - betas)
    if config["rescale_betas_zero_snr"]:  # arXiv 2305.08891, algorithm 1
        root = np.sqrt(kept)
        kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    if config["timestep_spacing"] == "trailing":
        times = np.round(np.arange(count, 0, -count / steps)).astype(int) - 1
    else:
        times = np.arange(steps)[::-1] * (count // steps) + config["steps_offset"]
    last = 1.0 if config["set_alpha_to_one"] else float(kept[0])
    for time_now in times.tolist():
        before = time_now - count // steps
        velocity = config["prediction_type"] == "v_prediction"
        yield Step(time_now, float(kept[time_now]), float(kept[before]) if before >= 0 else last, velocity)


def config_of(folder: Path, name: str = "config") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


if __name__ == "__main__":
    try:
        main()
    except (ShiraError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
