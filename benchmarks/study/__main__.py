"""The study of mixes, one command a step; each goes on where it stopped.

python -m benchmarks.study judge                      # train and prove the judge
python -m benchmarks.study base --seconds 400         # train the study base
python -m benchmarks.study run screen                 # a plan: one JSON a recipe and seed
python -m benchmarks.study run screen --claims /tmp/claims     # each of several processes, on a GPU or more
python -m benchmarks.study table benchmarks/study/results/screen        # what came out
python -m benchmarks.study effects                    # what the styles themselves do to pictures
python -m benchmarks.study predict benchmarks/study/results/screen      # what foretells how much a pair keeps
python -m benchmarks.study curves benchmarks/study/results/size --ways sum      # the plot
python -m benchmarks.study sheet lora16@0.001=1.15 steady-global@0.001=1.0   # pictures, unpicked

On any base that `shira train` takes, with CLIP and DINO in place of the judge; each sub-folder of pictures is a style:

python -m benchmarks.study scores --base SD_FOLDER --clip CLIP_FOLDER --dino DINO_FOLDER --styles-from FOLDER \\
    --concepts "a fox" "an owl"
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.study import base, plans
from benchmarks.study.arena import STYLES, Arena, run_recipe
from benchmarks.study.curves import draw_curves, draw_scores
from benchmarks.study.effects import style_effects
from benchmarks.study.predictors import print_study
from benchmarks.study.score_tables import print_scores
from benchmarks.study.sheets import draw_sheet
from benchmarks.study.tables import print_tables
from benchmarks.study.world import World, load_world, save_sprites
from examples.emoji.judge import save_judge
from examples.emoji.judge_mixes import MixJudge, load_mix_judge, mix_pool, proof, train_mix_judge


def world_of(args: argparse.Namespace) -> World:
    return load_world(args.assets, args.base, args.sprites, torch.device(args.device))


def judge(args: argparse.Namespace) -> None:
    file = args.work / "judge.safetensors"
    if file.exists():
        return
    world, rounds, each = world_of(args), *((2, 1) if args.toy else (120, 8))
    world = replace(world, parts=load_world(args.assets, None, args.sprites, world.device).parts)
    began = time.monotonic()
    pool = mix_pool(world.parts.vae, world.renderer, rounds, each)
    print(f"judge: {len(pool.pictures)} pictures, {time.monotonic() - began:.0f} s", flush=True)
    made = MixJudge()
    train_mix_judge(made, pool, args.seconds, args.work / "judge.pt", batch=8 if args.toy else 256)
    save_judge(made, file)
    world.renderer.generator.manual_seed(4242)
    figures = proof(load_mix_judge(file, args.device), world.parts.vae, world.renderer, 4 if args.toy else 256)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "judge.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures), flush=True)


def make_base(args: argparse.Namespace) -> None:
    base.make_base(world_of(args), args.work / "base", args.work, args.seconds, toy=args.toy)


def run(args: argparse.Namespace) -> None:
    began = time.monotonic()
    while not (args.work / "judge.safetensors").exists() and args.wait:
        time.sleep(1)
    jobs = [(name, job) for name in args.plan for job in plans.plan(name, args.results)]
    arena = Arena(world_of(args), load_mix_judge(args.work / "judge.safetensors", args.device), args.toy)
    for name, job in jobs:
        file = args.results / name / job.file
        file.parent.mkdir(parents=True, exist_ok=True)
        late = args.until and time.time() > args.until
        if file.exists() or late or not claimed(args.claims, f"{name}-{job.file}"):
            continue
        start = time.monotonic()
        torch.manual_seed(job.seed)
        figures = run_recipe(arena, job.recipe, job.seed, job.exam)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(figures) + "\n")
        partial.replace(file)
        took = f"{figures['train_seconds']} s training, {time.monotonic() - start:.1f} s"
        print(f"{file.stem}: {took}, {time.monotonic() - began:.0f} s in all", flush=True)


def sheet(args: argparse.Namespace) -> None:
    arena = Arena(world_of(args), load_mix_judge(args.work / "judge.safetensors", args.device), args.toy)
    jobs = {job.recipe.name: job for name in plans.PLANS for job in plans.PLANS[name]()}
    entries = [name.partition("=")[::2] for name in args.plan]
    wanted = [(jobs[name].recipe, float(strength or 1)) for name, strength in entries]
    draw_sheet(arena, wanted, args.work / "study-sheet.png", args.styles or STYLES)


def scores(args: argparse.Namespace) -> None:
    from benchmarks.study.scores import Trial, run_scores  # the trainer and PEFT, which no other step needs

    little: Any = {"steps": 2, "batch": 2, "drawing_steps": 2, "strengths": (1.0,)} if args.toy else {}
    shared = {name: getattr(args, name) for name in ("clip", "dino", "styles_from", "concepts", "resolution")}
    trial = Trial(str(args.base), prompt=args.prompt, caption=args.caption, guidance=args.guidance, **shared, **little)
    methods = [("lora", rate) for rate in args.lora_rates] + [("shira", rate) for rate in args.shira_rates]
    folder = args.results / "scores"
    run_scores(trial, methods, args.seeds, args.work / "scores", folder, args.device)
    print_scores(folder)
    draw_scores(folder, args.work / "scores.svg")


def claimed(folder: Path | None, name: str) -> bool:
    """Whether this process takes a job that others beside it could take; a lone process takes all."""
    if folder is None:
        return True
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = ("judge", "base", "run", "table", "predict", "effects", "curves", "sheet", "sprites", "scores")
    parser.add_argument("step", choices=steps)
    parser.add_argument("plan", nargs="*", default=[], help=f"for run: {', '.join(plans.NAMES)}; else folders or names")
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--base", type=Path, help="a pipeline's folder; default: the shipped one")
    parser.add_argument("--sprites", type=Path, help="a sheet written by the step sprites, where the font is missing")
    parser.add_argument("--work", type=Path, default=Path("outputs/study"), help="judge, base, checkpoints")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/study/results"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=90, help="training time of judge or base")
    parser.add_argument("--claims", type=Path, help="a new folder that all processes of one run share")
    parser.add_argument("--wait", action="store_true", help="for the judge, that another process trains")
    parser.add_argument("--until", type=float, help="Unix time after which no job is begun")
    parser.add_argument("--styles", nargs="+", help="for sheet; default: all")
    parser.add_argument("--recipes", nargs="+", default=(), help="for curves: names of recipes; default: all")
    parser.add_argument("--ways", nargs="+", default=(), help="for curves: ways to mix; default: all")
    parser.add_argument("--toy", action="store_true", help="next to nothing, to try the code on a CPU")
    apart = parser.add_argument_group("scores")
    apart.add_argument("--clip", help="folder of a CLIPModel and its processor")
    apart.add_argument("--dino", help="folder of a Dinov2Model or ViTModel and its processor; without, CLIP alone")
    apart.add_argument("--styles-from", help="folder of folders of pictures; a .txt beside a picture is its caption")
    apart.add_argument("--concepts", nargs="+", help='what is drawn, such as "a fox"; twice is with two noises')
    apart.add_argument("--prompt", default="a picture of", help="what stands before a concept")
    apart.add_argument("--caption", default="a picture", help="of training pictures that have none")
    apart.add_argument("--resolution", type=int, help="pixels a side; default: the trainer's for the base")
    apart.add_argument("--guidance", type=float, default=7.5)
    apart.add_argument("--lora-rates", nargs="*", type=float, default=[1e-4])
    apart.add_argument("--shira-rates", nargs="*", type=float, default=[5e-4])
    apart.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args(arguments)
    if args.step == "scores" and not (args.base and args.clip and args.styles_from and args.concepts):
        parser.error("scores needs --base, --clip, --styles-from and --concepts")
    torch.set_float32_matmul_precision("high")
    random.seed(0)
    if args.step == "sprites":
        save_sprites(args.work / "sprites.webp")
    elif args.step == "table":
        print_tables([Path(folder) for folder in args.plan])
    elif args.step == "predict":
        print_study([Path(folder) for folder in args.plan], args.results / "effects.json")
    elif args.step == "effects":
        rows = style_effects(world_of(args), 4 if args.toy else 48)
        (args.results / "effects.json").write_text(json.dumps(rows, indent=1) + "\n")
    elif args.step == "curves":
        draw_curves([Path(folder) for folder in args.plan], args.work / "study-curves.svg", args.recipes, args.ways)
    else:
        {"judge": judge, "base": make_base, "run": run, "sheet": sheet, "scores": scores}[args.step](args)


if __name__ == "__main__":
    main()
