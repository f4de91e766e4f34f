"""The pipeline's five parts, built from scratch, and its folder on disk."""

import itertools
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .captions import vocabulary

IMAGE_SIZE = 128
MAX_TOKENS = 32
WIDTH = 192
_START, _END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Parts:
    """The trained components of one pipeline, before they are put together."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL

    def pipeline(self) -> StableDiffusionPipeline:
        """A standard pipeline over these very objects."""
        pipe = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


def build_parts(tokenizer_folder: Path, seed: int = 0) -> Parts:
    """All parts with random weights; the tokenizer's two files are written to `tokenizer_folder`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(tokenizer_folder, vocabulary())
    return Parts(tokenizer, build_text_encoder(tokenizer), build_unet(), build_vae())


def build_unet() -> UNet2DConditionModel:
    """A small SD UNet: attention and feed-forward at 16 x 16, 8 x 8 and in the middle, 13.9 M parameters."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        block_out_channels=(96, 160, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        attention_head_dim=(3, 5, 6),  # diffusers reads these as numbers of heads, of 32 channels each
        cross_attention_dim=WIDTH,
    )


def build_vae() -> AutoencoderKL:
    """An f8 autoencoder with 4 latent channels, 3.4 M parameters. Set `scaling_factor` once it is trained."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A four-layer CLIP text model over the recipe's own vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=6,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """DDIM on v-prediction with zero terminal SNR, so that plain dark and saturated backgrounds come out right.

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", https://arxiv.org/abs/2305.08891
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # trailing spacing ignores it; StableDiffusionPipeline warns about any other value
    )


def build_tokenizer(folder: Path, words: Iterable[str]) -> CLIPTokenizer:
    """A CLIP tokenizer in which each of `words` is one token and any other text is spelled in smaller ones."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = _merges(words)
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), _START, _END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def _byte_letters() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, as in GPT-2 and CLIP."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """BPE merges after which every word is one piece.

    Each word is segmented by the merges so far and its pieces are joined from the left. Later merges rank behind all of
    those, so no earlier word is disturbed.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = _segment([*word[:-1], word[-1] + "</w>"], ranks)
        while len(pieces) > 1:
            ranks.setdefault((pieces[0], pieces[1]), len(ranks))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return list(ranks)


def _segment(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Apply BPE: join the best-ranked adjacent pair until none is known."""
    while len(pieces) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(pieces)))
        if rank == len(ranks):
            break
        pieces = [*pieces[:at], pieces[at] + pieces[at + 1], *pieces[at + 2 :]]
    return pieces


def save_pipeline(parts: Parts, folder: Path) -> None:
    """Write the pipeline in float16; a plain `from_pretrained` gives float32 throughout.

    The parts themselves become float16: reload them for further training.
    """
    for module in (parts.text_encoder, parts.unet, parts.vae):
        module.half()
    parts.pipeline().save_pretrained(folder)
    weights = folder / "text_encoder" / "model.safetensors"
    save_file(with_prefix(load_file(weights)), weights, metadata={"format": "pt"})
    source = Path(parts.tokenizer.name_or_path)
    for name in ("vocab.json", "merges.txt"):  # transformers 5 writes tokenizer.json only; version 4 reads these two
        shutil.copy(source / name, folder / "tokenizer" / name)
    config = folder / "text_encoder" / "config.json"
    settings = json.loads(config.read_text())
    settings["dtype"] = "float32"  # transformers 5 follows this entry, else the checkpoint's own dtype
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def with_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's keys as checkpoints have them: transformers 5.6 leaves out `text_model.`, which older versions need."""
    return {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in state.items()}


def load_parts(folder: Path) -> Parts:
    """The parts of a saved pipeline, in float32 on the CPU."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    return Parts(pipe.tokenizer, pipe.text_encoder, pipe.unet, pipe.vae)
