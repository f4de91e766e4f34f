"""Serve pictures over HTTP: ``shira serve``."""

import argparse
from typing import Any

from shira_diffusers.cli.terminal import note, say_json
from shira_diffusers.errors import ShiraError
from shira_diffusers.serving.local import run


def serve(args: argparse.Namespace) -> None:
    """Serve until interrupted.

    Raises:
        ShiraError: see ``local.run``.
    """

    def ready(address: str) -> None:
        note(f"ready at {address}")
        if args.json:
            say_json({"address": address})

    given: dict[str, Any] = {name: value for name, value in vars(args).items() if name in _NAMES and value is not None}
    given |= dict(map(_pair, args.set))
    run(given, args.host, args.port, note, ready)


_NAMES = ("model", "adapters", "keys", "replicas", "device", "dtype", "cuda_graphs")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ShiraError(f"--set takes NAME=VALUE, got {text!r}")
    return name, value
