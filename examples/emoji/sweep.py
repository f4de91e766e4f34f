"""Train a style with given flags of the trainer and judge each checkpoint on concepts that no picture shows.

python -m examples.emoji.sweep bluefire --name "wm, 2e-3" --out outputs/sweep.json -- \
    --mask_type wm --learning_rate 2e-3 --train_batch_size 16 --max_train_steps 1000 --checkpointing_steps 200

Everything after `--` goes to the trainer; figures are appended to the JSON file.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from shira_diffusers.dreambooth.checkpoints import list_checkpoints
from shira_diffusers.dreambooth.command_line import parse_config
from shira_diffusers.dreambooth.train import train

from .evaluate import generate
from .evaluate_styles import prompts_for
from .judge import load_judge
from .judge_styles import judge_style, unseen_concepts

COMMON = ("--resolution", "128", "--target_modules", "all", "--calibration_steps", "12", "--lr_scheduler", "cosine")
COMMON += ("--lr_warmup_steps", "0", "--seed", "0", "--report_to", "none")


def judged(assets: Path, output: Path, style: str, count: int, device: str) -> list[dict[str, Any]]:
    """Rates of each checkpoint of a run, at strength 1, without the style's name in the prompt."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(assets / "emoji-diffusion").to(device)
    pipe.set_progress_bar_config(disable=True)
    judge = load_judge(assets / "judge" / "judge.safetensors", device)
    unseen = unseen_concepts(style)
    concepts = unseen[:: len(unseen) // count][:count]
    rows = []
    for checkpoint in list_checkpoints(output):
        with torch.no_grad():
            pipe.load_shira(checkpoint, "it")
            pictures = generate(pipe, prompts_for(concepts, None), seed=3_000, chunk=64)
            pipe.delete_shira("it")
        rows.append({"checkpoint": checkpoint.name, **judge_style(judge, pictures, concepts, style)})
    return rows


def main() -> None:
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    flags = sys.argv[len(own) + 2 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("style")
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", type=Path, default=Path("outputs/sweep.json"))
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(own)
    with tempfile.TemporaryDirectory() as output:
        base = ["--pretrained_model_name_or_path", str(args.assets / "emoji-diffusion")]
        base += ["--instance_data_dir", str(args.assets / "styles" / args.style), "--output_dir", output]
        train(parse_config([*base, "--instance_prompt", f"a picture in {args.style} style", *COMMON, *flags]))
        rows = judged(args.assets, Path(output), args.style, args.count, args.device)
    known = json.loads(args.out.read_text()) if args.out.exists() else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps([*known, {"style": args.style, "name": args.name, "flags": flags, "rows": rows}]))
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
