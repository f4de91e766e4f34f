"""The command line of a training script, made from the settings: each field is a flag with its type, default and help.

Flags of diffusers' ``train_dreambooth.py`` and ``train_dreambooth_lora*.py`` (SD, SDXL, SD3, Flux) without meaning here
are ignored with a warning, so that such a command line works as it is. ``HfArgumentParser`` does not fit: it knows no
tuples, groups of flags or secrets, and its help prints "default: None".
"""

import argparse
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.published_settings import public_settings

logger = logging.getLogger(__name__)

# the setting with which each group of ``--help`` begins; the settings are in this order
_GROUPS: Mapping[str, str] = {
    "instance_data_dir": "pictures and prompts",
    "mask_type": "which weights are trained",
    "seed": "training and memory",
    "learning_rate": "optimizer and loss",
    "with_prior_preservation": "prior preservation",
    "output_dir": "results, checkpoints and validation",
    "report_to": "trackers and the Hub",
}

_EXAMPLES = """examples:
  %(prog)s --pretrained_model_name_or_path ./my-model --instance_data_dir ./photos --instance_prompt "a sks dog"
  %(prog)s --pretrained_model_name_or_path ./my-model --instance_data_dir ./style --instance_prompt "zxc" --json"""

_METAVARS: Mapping[type, str] = {int: "N", float: "X", str: "TEXT"}


OFFSET_NOISE = 0.1  # the --noise_offset for the switch --offset_noise of diffusers' train_dreambooth.py

_NO_LORA = "there are no low-rank matrices: --density says how many entries of each weight are trained"
_ATTENTION = "attention is PyTorch's scaled_dot_product_attention, which chooses a memory-efficient kernel by itself"
_FRAMING = "the UNet receives the real crop of each picture"

# flag -> why it has no effect
_IGNORED: Mapping[str, str] = {
    "rank": _NO_LORA,
    "lora_alpha": _NO_LORA,
    "lora_dropout": "there are no low-rank matrices to drop: lower --density to regularize more",
    "output_kohya_format": "a SHiRA adapter has a format of its own, docs/format.md",
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "enable_npu_flash_attention": _ATTENTION,
    "local_rank": "accelerate launch and torchrun set the rank of each process",
    "tokenizer_name": "the base's own tokenizers are used",
    "tokenizer_max_length": "prompts are padded and cut to the length of the base's tokenizers",
    "text_encoder_use_attention_mask": "prompts are encoded as the base's pipeline encodes them",
    "pre_compute_text_embeddings": "prompts are always encoded in advance, except with --train_text_encoder",
    "class_labels_conditioning": "Stable Diffusion's UNets take no class labels",
    "validation_images": "validation pictures are made from --validation_prompt alone",
    "crops_coords_top_left_h": _FRAMING,
    "crops_coords_top_left_w": _FRAMING,
    "do_edm_style_training": "the loss is that of the base's own prediction type, epsilon or v_prediction",
    "set_grads_to_none": "gradients are always freed after a step",
    "lora_layers": "--target_modules names the layers",
    "lora_blocks": "--target_modules names the layers, of some blocks by patterns such as *blocks.3.*to_q",
    "upcast_before_saving": "an adapter's values are trained in float32 and saved in float16",
    "skip_save_text_encoder": "an adapter's file holds trained entries only, never a text encoder",
}
_IGNORED_SWITCHES = {
    "output_kohya_format", "enable_xformers_memory_efficient_attention", "enable_npu_flash_attention",
    "text_encoder_use_attention_mask", "pre_compute_text_embeddings", "do_edm_style_training", "set_grads_to_none",
    "skip_save_text_encoder", "upcast_before_saving",
}  # fmt: skip


def parse_config(arguments: Sequence[str] | None = None, program: str | None = None) -> TrainingConfig:
    """Read the command line.

    Args:
        arguments: without the program's name; None takes ``sys.argv``. Flags of diffusers' scripts that have no
            meaning here are accepted with a warning.
        program: what ``--help`` calls it; None is the name in ``sys.argv``.

    Raises:
        SystemExit: unknown or missing flags, or values of another type, after one line that says so.
        ShiraError: settings out of range or at odds with each other.
    """
    chosen = drop_ignored_flags(vars(_parser(program).parse_args(arguments)))
    del chosen["json"]  # no setting: it does not change what is trained
    settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in chosen.items()}
    return TrainingConfig(**settings)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line: the usage of this many flags would hide what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists all flags\n")


def _parser(program: str | None = None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        description="Train a SHiRA adapter for Stable Diffusion or Flux from a few pictures (DreamBooth).",
        usage="%(prog)s --pretrained_model_name_or_path BASE --instance_data_dir FOLDER --instance_prompt TEXT [flags]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32),
        epilog=_EXAMPLES,
    )
    hints = get_type_hints(TrainingConfig)
    group = parser.add_argument_group("base model")
    for setting in fields(TrainingConfig):
        if setting.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[setting.name])
        group.add_argument(f"--{setting.name}", **_options(setting, hints[setting.name]))
    parser.add_argument("--json", action="store_true", help="say what was written as JSON at the end, for programs")
    add_ignored_flags(parser)
    return parser


def launch_command(config: TrainingConfig, processes: int = 1, *, public: bool = False) -> str:
    """Make the shell command that runs the script with these settings, one flag per line, without secrets.

    Args:
        public: names in place of paths that lead out of the working directory.
    """
    several = f"--multi_gpu --num_processes {processes} " if processes > 1 else ""
    lines = [shlex.join(flag) for flag in command_line(config, public=public)]
    return " \\\n  ".join([f"accelerate launch {several}train_dreambooth_shira.py", *lines])


def command_line(config: TrainingConfig, *, public: bool = False) -> list[list[str]]:
    """List the flags that give these settings, each with its values, without defaults and secrets.

    Args:
        public: names in place of paths that lead out of the working directory.
    """
    shown = public_settings(config) if public else vars(config)
    changed = [
        setting.name
        for setting in fields(TrainingConfig)
        if getattr(config, setting.name) != setting.default and not setting.metadata.get("secret")
    ]
    return [_flag(name, shown[name]) for name in changed]


def _flag(name: str, value: Any) -> list[str]:
    if value is True and getattr(TrainingConfig, name) is False:
        return [f"--{name}"]
    values = [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
    if values[0].startswith("-"):  # which argparse would take for a flag
        return [f"--{name}={values[0]}", *values[1:]]
    return [f"--{name}", *values]


def _options(setting: Field[Any], hint: Any) -> dict[str, Any]:
    help = _help(setting).replace("%", "%%")
    if get_origin(hint) is UnionType or NoneType in get_args(hint):
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    if hint is bool and setting.default is False:
        return {"action": "store_true", "help": help}
    if hint is bool:
        return {"type": _truth, "default": setting.default, "metavar": "true|false", "help": help}
    options: dict[str, Any] = {"help": help}
    options |= {"required": True} if setting.default is MISSING else {"default": setting.default}
    if get_origin(hint) is Literal:
        return {**options, "choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {**options, "nargs": "+", "type": str, "metavar": "TEXT"}
    return {**options, "type": hint, "metavar": _METAVARS[hint]}


def _help(setting: Field[Any]) -> str:
    """The help of a flag, with its default where that is a value."""
    default, help = setting.default, str(setting.metadata["help"])
    if default is MISSING:
        return f"{help} (required)"
    if default is False or default is None or default == ():
        return help
    return f"{help} (default: {' '.join(default) if isinstance(default, tuple) else str(default)})"


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in ("true", "1")


def add_ignored_flags(parser: argparse.ArgumentParser) -> None:
    """Let a parser accept the flags that have no effect, or another name here, without listing them in ``--help``."""
    hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    for name in _IGNORED:
        kind: Any = {"action": "store_true"} if name in _IGNORED_SWITCHES else {"nargs": "+"}
        parser.add_argument(f"--{name}", **kind, **hidden)
    parser.add_argument("--offset_noise", dest="noise_offset", action="store_const", const=OFFSET_NOISE, **hidden)


def drop_ignored_flags(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the flags that have no effect, each with a warning."""
    for name in _IGNORED.keys() & chosen.keys():
        logger.warning("--%s has no effect: %s", name, _IGNORED[name])
    return {name: value for name, value in chosen.items() if name not in _IGNORED}
