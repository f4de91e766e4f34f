"""Stage 4: every figure the bars ask for, and the contact sheets."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor

from .captions import LOOKS, STYLES, caption
from .concepts import BACKGROUND_NAMES, CONCEPTS, held_out_pairs, is_held_out
from .data import Renderer
from .judge import Judge, load_judge
from .judge_styles import true_rates
from .render import concept_sprites, other_emoji, sprites
from .sheet import contact_sheet
from .train_vae import round_trip

STEPS = 20
GUIDANCE = 3.0
HELD_OUT_EMOJI = 20  # one other emoji in so many is kept from the autoencoder
Pair = tuple[int, int]
Rates = dict[str, float]


def generate(
    pipe: StableDiffusionPipeline, prompts: list[str], *, guidance: float = GUIDANCE, seed: int = 0, chunk: int = 256
) -> Tensor:
    """One picture a prompt, from seeds `seed`, `seed` + 1, ...: in [0, 1], (N, 3, 128, 128), on the CPU."""
    pictures = []
    for start in range(0, len(prompts), chunk):
        part = prompts[start : start + chunk]
        generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(part))]
        output = pipe(part, num_inference_steps=STEPS, guidance_scale=guidance, generator=generators, output_type="pt")
        pictures.append(output.images.float().cpu())
    return torch.cat(pictures)


def trained_pairs(each: int) -> list[Pair]:
    """`each` backgrounds for every concept, spread evenly, none held out."""
    pairs = []
    for concept in range(len(CONCEPTS)):
        allowed = [b for b in range(len(BACKGROUND_NAMES)) if not is_held_out(concept, b)]
        pairs += [(concept, allowed[(concept + i * len(allowed) // each) % len(allowed)]) for i in range(each)]
    return pairs


@torch.no_grad()
def predictions(judge: Judge, pictures: Tensor, chunk: int = 256) -> dict[str, Tensor]:
    """The likeliest class by head, (N,) each, on the CPU."""
    device = next(judge.parameters()).device
    parts = [judge(part.to(device)) for part in pictures.split(chunk)]
    return {head: torch.cat([part[head].argmax(1).cpu() for part in parts]) for head in parts[0]}


def pair_rates(judge: Judge, pictures: Tensor, pairs: list[Pair]) -> Rates:
    """How often the judge names the asked concept, the asked background, and both."""
    said = predictions(judge, pictures)
    wanted = torch.tensor(pairs)
    concept, background = said["concept"] == wanted[:, 0], said["background"] == wanted[:, 1]
    rates = {"concept": concept, "background": background, "both": concept & background}
    return {name: round(float(right.float().mean()), 4) for name, right in rates.items()} | {"pictures": len(pairs)}


def worst_concepts(judge: Judge, pictures: Tensor, pairs: list[Pair], count: int = 12) -> dict[str, float]:
    """The concepts most often missed, with their rates."""
    right = predictions(judge, pictures)["concept"] == torch.tensor(pairs)[:, 0]
    shown = torch.tensor(pairs)[:, 0]
    rates = {concept.name: float(right[shown == i].float().mean()) for i, concept in enumerate(CONCEPTS)}
    return dict(sorted(rates.items(), key=lambda item: item[1])[:count])


def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio of the round trip, in dB, picture by picture."""
    error = torch.cat([(round_trip(vae, part) - part).square().mean((1, 2, 3)) for part in pictures.split(64)])
    return round(float((-10 * error.log10()).mean()), 2)


def vae_figures(vae: AutoencoderKL, renderer: Renderer, count: int) -> dict[str, Rates]:
    """The round trip on fresh renderings, looks, styles, anything, and emoji the autoencoder never saw."""
    strangers = split_other_emoji()[1].to(renderer.device)
    unseen = Renderer(strangers, strangers, seed=424_243)
    plain = torch.zeros(count, dtype=torch.long, device=renderer.device)
    never_seen = unseen.draw(unseen.integers(count, len(unseen)), unseen.integers(count, len(BACKGROUND_NAMES)), plain)
    figures = {
        "plain": psnr(vae, renderer.any_pair(count).pictures),
        "looks": psnr(vae, renderer.any_pair(count, plain_share=0.0).pictures),
        "anything": psnr(vae, renderer.wild(count).pictures),
        "unseen_emoji": psnr(vae, never_seen.pictures),
    }
    figures |= {style: psnr(vae, renderer.styled(count, style).pictures) for style in STYLES}
    return {"psnr_db": figures}


def judge_figures(judge: Judge, vae: AutoencoderKL, renderer: Renderer, count: int) -> dict[str, Rates]:
    """How far the judge itself can be trusted: on true renderings after the round trip."""
    batch = renderer.any_pair(count)
    pictures = torch.cat([round_trip(vae, part) for part in batch.pictures.split(64)])
    pairs = list(zip(batch.concept.tolist(), batch.shown.tolist(), strict=True))
    plain = float((predictions(judge, pictures)["style"] == 0).float().mean())
    figures = {"plain": pair_rates(judge, pictures, pairs) | {"style": round(plain, 4)}}
    return figures | {style: true_rates(judge, vae, renderer, style, count) for style in STYLES}


def generated_figures(pipe: StableDiffusionPipeline, judge: Judge, each: int, held_out: int) -> dict[str, Any]:
    """The base model's rates on trained and on held-out pairs, at guidance 3, and at the pipeline's default of 7.5."""

    def rates(pairs: list[Pair], seed: int, guidance: float = GUIDANCE) -> Rates:
        return pair_rates(judge, generate(pipe, _prompts(pairs), guidance=guidance, seed=seed), pairs)

    pairs = trained_pairs(each) if each else trained_pairs(1)[:4]
    pictures = generate(pipe, _prompts(pairs), seed=10_000)
    return {
        "trained_pairs": pair_rates(judge, pictures, pairs),
        "held_out_pairs": rates(held_out_pairs()[:held_out], 500_000),
        "trained_pairs_guidance_7.5": rates(trained_pairs(1) if each else pairs, 900_000, 7.5),
        "worst_concepts": worst_concepts(judge, pictures, pairs),
    }


def _prompts(pairs: list[Pair]) -> list[str]:
    return [caption(CONCEPTS[concept], BACKGROUND_NAMES[background]) for concept, background in pairs]


def write_sheets(pipe: StableDiffusionPipeline, file: Path, count: int) -> None:
    """One picture of each of the first `count` concepts, and below a row of every look."""
    pairs = trained_pairs(1)[:count]
    small = torch.nn.functional.interpolate(generate(pipe, _prompts(pairs), seed=1), size=80, mode="area")
    contact_sheet(small, [CONCEPTS[concept].name for concept, _ in pairs], 22, file, colors=255)
    subjects = [CONCEPTS[i % len(CONCEPTS)] for i in (1, 5, 77, 130, 200, 260)]
    looks = [(subject, look) for subject in subjects for look in LOOKS]
    prompts = [caption(subject, BACKGROUND_NAMES[i % 16], look) for i, (subject, look) in enumerate(looks)]
    pictures = generate(pipe, prompts[:count], seed=77)
    contact_sheet(pictures, [look for _, look in looks][:count], len(LOOKS), file.with_name("looks.png"), colors=255)


def seconds_a_picture(pipe: StableDiffusionPipeline, tries: int = 7) -> float:
    """The best wall time of one picture, text encoding and decoding included."""
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        pipe("a picture of a red apple on a teal background", num_inference_steps=STEPS, guidance_scale=GUIDANCE)
        times.append(time.perf_counter() - start)
    return round(min(times), 3)


def folder_bytes(folder: Path) -> int:
    """The size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def evaluate(assets: Path, *, device: str, count: int, each: int, held_out: int) -> dict[str, Any]:
    """All figures of the pipeline and the judge in `assets`; also writes the contact sheets there.

    Args:
        count: renderings a figure. each: pictures a concept. held_out: pictures of pairs kept from training.
    """
    pipe = StableDiffusionPipeline.from_pretrained(assets / "emoji-diffusion").to(device)
    pipe.set_progress_bar_config(disable=True)
    judge = load_judge(assets / "judge" / "judge.safetensors", device)
    seen, _ = split_other_emoji()
    renderer = Renderer(concept_sprites().to(device), seen.to(device), seed=424_242)
    write_sheets(pipe, assets / "contact_sheet.png", len(CONCEPTS) if each else 8)
    return {
        "concepts": len(CONCEPTS),
        "backgrounds": len(BACKGROUND_NAMES),
        "folder_bytes": folder_bytes(assets / "emoji-diffusion"),
        **early_figures(assets, pipe.vae, renderer, count),
        "generated": generated_figures(pipe, judge, each, held_out),
    }


def early_figures(assets: Path, vae: AutoencoderKL, renderer: Renderer, count: int) -> dict[str, Any]:
    """What is known before the base model is trained: of the autoencoder and of the judge."""
    judge = load_judge(assets / "judge" / "judge.safetensors", renderer.device)
    return {
        "vae": vae_figures(vae, renderer, count),
        "judge_on_true_pictures": judge_figures(judge, vae, renderer, count),
    }


def round_trip_sheet(vae: AutoencoderKL, renderer: Renderer, file: Path) -> None:
    """Rows of plain pictures, looks, styles and anything, each above its round trip."""
    kinds = [renderer.any_pair(14), renderer.any_pair(14, plain_share=0.0)]
    kinds += [*(renderer.styled(14, style) for style in STYLES), renderer.wild(14)]
    rows = [rows for batch in kinds for rows in (batch.pictures, round_trip(vae, batch.pictures))]
    contact_sheet(torch.cat(rows), [""] * 14 * len(rows), 14, file)


def split_other_emoji() -> tuple[Tensor, Tensor]:
    """Sprites for the autoencoder to learn from, and sprites it must never see."""
    drawn = [sprite for sprite in sprites(other_emoji()) if sprite[3].any()]
    seen = [sprite for i, sprite in enumerate(drawn) if i % HELD_OUT_EMOJI]
    return torch.stack(seen), torch.stack(drawn[::HELD_OUT_EMOJI])


def write_metrics(file: Path, figures: dict[str, Any]) -> None:
    """Merge figures into the JSON file."""
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | figures, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=1024, help="renderings a figure")
    parser.add_argument("--each", type=int, default=6, help="generated pictures a concept")
    parser.add_argument("--held-out", type=int, default=1000, help="generated pictures of held-out pairs, at most")
    parser.add_argument("--speed", action="store_true", help="only time one picture on this machine's CPU")
    args = parser.parse_args()
    if args.speed:
        pipe = StableDiffusionPipeline.from_pretrained(args.assets / "emoji-diffusion")
        pipe.set_progress_bar_config(disable=True)
        figures = {"cpu": {"seconds_a_picture": seconds_a_picture(pipe), "threads": torch.get_num_threads()}}
    else:
        figures = evaluate(args.assets, device=args.device, count=args.count, each=args.each, held_out=args.held_out)
    write_metrics(args.assets / "metrics.json", figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
