"""The command line of a training script, made from the settings: a flag is a field, with its type, default and help."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from shira_diffusers.training.accepted import add_accepted, drop_accepted
from shira_diffusers.training.config import TrainingConfig


def parse_config(arguments: Sequence[str] | None = None) -> TrainingConfig:
    """Read the command line.

    Args:
        arguments: without the program's name; None takes ``sys.argv``. Flags of diffusers' scripts that have no
            meaning here are accepted with a warning.

    Raises:
        SystemExit: unknown flags, or values of another type, after the usual message.
        ShiraError: settings out of range or at odds with each other.
    """
    parser = argparse.ArgumentParser(
        description="Train a SHiRA adapter for Stable Diffusion from a few pictures (DreamBooth).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    hints = get_type_hints(TrainingConfig)
    for setting in fields(TrainingConfig):
        parser.add_argument(f"--{setting.name}", **_options(setting, hints[setting.name]))
    add_accepted(parser)
    chosen = drop_accepted(vars(parser.parse_args(arguments)))
    settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in chosen.items()}
    return TrainingConfig(**settings)


def command_line(config: TrainingConfig) -> list[list[str]]:
    """The flags that give these settings, each with its values: what is default, and what is secret, is left out."""
    changed = [
        (setting.name, getattr(config, setting.name))
        for setting in fields(TrainingConfig)
        if getattr(config, setting.name) != setting.default and not setting.metadata.get("secret")
    ]
    return [_flag(name, value) for name, value in changed]


def _flag(name: str, value: Any) -> list[str]:
    if value is True:
        return [f"--{name}"]
    values = [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
    if values[0].startswith("-"):  # which argparse would take for a flag
        return [f"--{name}={values[0]}", *values[1:]]
    return [f"--{name}", *values]


def _options(setting: Field[Any], hint: Any) -> dict[str, Any]:
    help = setting.metadata["help"].replace("%", "%%")
    if hint is bool and not setting.default:
        return {"action": "store_true", "help": help}
    if hint is bool:
        return {"type": _truth, "default": True, "metavar": "true|false", "help": help}
    options: dict[str, Any] = {"help": help}
    options |= {"required": True} if setting.default is MISSING else {"default": setting.default}
    if get_origin(hint) is UnionType or NoneType in get_args(hint):
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is Literal:
        return {**options, "choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {**options, "nargs": "+", "type": str}
    return {**options, "type": hint}


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in ("true", "1")
