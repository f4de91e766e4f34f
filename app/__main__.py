"""``python -m app``: serve the app, by default on the bundled demo model."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from app.loading import DTYPES
from app.session import Session
from app.ui import build, launch
from shira_diffusers import ShiraError

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m app", description="Mix styles on a resident diffusion pipeline.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    parser.add_argument("--base", default=str(ASSETS / "emoji-diffusion"), help="pipeline folder or Hub id")
    parser.add_argument("--adapters", type=Path, default=ASSETS / "adapters", help="folder of .safetensors files")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ... (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of the weights (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted; what goes wrong at the start is one line."""
    options = parse(arguments)
    try:
        session = Session.open(options.base, options.adapters, device=options.device, dtype=options.dtype)
        launch(build(session), options.host, options.port)
    except (ShiraError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
