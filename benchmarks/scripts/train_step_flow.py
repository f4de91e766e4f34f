"""A training step of a flow matching transformer: time and peak memory of SHiRA and of LoRA, in the same loop.

python -m benchmarks.scripts.train_step_flow [--toy] [--models "SD3 medium"] [--only lora "shira rand"] [--out FILE]

Transformers of real width with random bfloat16 weights, random latents and text embeddings: SD3 medium whole (2.0 B
parameters), Flux with 4 of its 19 double and 8 of its 38 single blocks (2.5 B), or as many as ``--blocks`` says. The
loop and the methods are those of ``benchmarks.scripts.training``; LoRA has rank 16, "8-bit" is bitsandbytes' AdamW.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor

from benchmarks.measure import Run, free, options
from benchmarks.scripts import training
from benchmarks.scripts.training import Case, Trained
from shira_diffusers.dreambooth.launch import without_cudnn_attention

RANK = 16
MODELS = ("SD3 medium", "Flux")
SECONDS = {"cuda": 420, "cpu": 420}
WIDTHS: dict[str, dict[str, Any]] = {
    "SD3 medium": {
        "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64,
        "caption_projection_dim": 1536, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    },
    "Flux": {
        "in_channels": 64, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 4096,
        "pooled_projection_dim": 768, "guidance_embeds": True,
    },
}  # fmt: skip
"""As ``SD3Transformer2DModel`` and ``FluxTransformer2DModel`` take them."""
_TINY = {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
TOY: dict[str, dict[str, Any]] = {
    "SD3 medium": {
        **_TINY, "sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "caption_projection_dim": 16,
        "pos_embed_max_size": 16,
    },
    "Flux": {
        **_TINY, "in_channels": 64, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
    },
}  # fmt: skip


def main() -> None:
    args = parse()
    training.METHODS.update(METHODS)
    about = {"targets": training.TARGETS, "density": args.density, "lora_rank": RANK, "pixels": args.pixels}
    run = Run("train_step_flow", args, per_device=False, blocks=args.blocks, **about)
    for name in args.models:
        model = make_transformer(name, args)
        inputs = partial(flux_inputs if name == "Flux" else sd3_inputs, model, args.pixels // 8)
        for batch, saving in product(args.batch, (False, True)):
            for method in args.only:
                case = Case(name, batch, saving, True, method)
                attempt = partial(training.attempt, model, inputs, case, args)
                run.case(attempt, parameters=sum(p.numel() for p in model.parameters()), **case._asdict())
        del model, inputs, attempt
        training.MASKS.clear()
        free()
    training.compare(run.rows)
    print(run.write().read_text())
    sys.exit(any("failed" in row for row in run.rows))


def parse() -> argparse.Namespace:
    parser = options(__doc__, SECONDS, MODELS)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--pixels", type=int, default=1024, help="per side of a picture")
    parser.add_argument("--blocks", nargs=2, type=int, default=[4, 8], help="double and single blocks of Flux")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=3)
    args = parser.parse_args()
    args.device = "cpu" if args.toy else "cuda"
    if args.toy:
        args.pixels, args.blocks = 64, [1, 2]
    return args


def make_transformer(name: str, args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = (TOY if args.toy else WIDTHS)[name]
    with torch.device(args.device):
        if name == "Flux":
            double, single = args.blocks
            model: Any = FluxTransformer2DModel(**config, num_layers=double, num_single_layers=single)
        else:
            model = SD3Transformer2DModel(**config)
    return model.to(torch.bfloat16).train()  # there is no dropout in it


def sd3_inputs(model: Any, latents: int, batch: int) -> dict[str, Any]:
    """Noise in place of latents ``(batch, 16, latents, latents)`` and of the text of two CLIPs and a T5."""
    noise = partial(_noise, model)
    return {
        "hidden_states": noise(batch, 16, latents, latents),
        "timestep": torch.full((batch,), 500.0, device=model.device),
        "encoder_hidden_states": noise(batch, 77 + 77, model.config.joint_attention_dim),
        "pooled_projections": noise(batch, model.config.pooled_projection_dim),
    }


def flux_inputs(model: Any, latents: int, batch: int) -> dict[str, Any]:
    """Noise in place of packed latents ``(batch, (latents / 2)^2, 64)`` and of the text of a CLIP and a T5."""
    noise, side = partial(_noise, model), latents // 2
    places = torch.cartesian_prod(torch.zeros(1), *[torch.arange(float(side))] * 2)  # (side^2, 3)
    return {
        "hidden_states": noise(batch, side**2, model.config.in_channels),
        "timestep": torch.full((batch,), 0.5, device=model.device),
        "guidance": torch.full((batch,), 3.5, device=model.device),
        "encoder_hidden_states": noise(batch, 512, model.config.joint_attention_dim),
        "pooled_projections": noise(batch, model.config.pooled_projection_dim),
        "txt_ids": torch.zeros(512, 3, device=model.device),
        "img_ids": places.to(model.device),
    }


def _noise(model: Any, *shape: int) -> Tensor:
    return torch.randn(shape, device=model.device).to(model.dtype)


@contextmanager
def shira_8bit(model: Any, density: float) -> Iterator[Trained]:
    from bitsandbytes.optim import AdamW8bit

    with training.shira("rand")(model, density) as trained:
        yield replace(trained, adamw=AdamW8bit)


METHODS: dict[str, Callable[[Any, float], Any]] = {
    **{name: training.METHODS[name] for name in ("frozen", "shira rand", "shira rand recompute", "shira struct")},
    "shira rand 8-bit": shira_8bit,
    "lora": training.lora(RANK),
}


if __name__ == "__main__":
    with without_cudnn_attention():
        main()
