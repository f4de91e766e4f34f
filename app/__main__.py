"""``python -m app``: serve the app, by default on the bundled demo model."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from app.loading import DTYPES
from app.studio import Studio, default_data
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
    parser.add_argument(
        "--data", type=Path, default=default_data(), help="folder for all that the app writes (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ... (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of the weights (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted; what goes wrong at the start is one line."""
    options = parse(arguments)
    try:
        studio = Studio.open(options.base, options.adapters, options.data, device=options.device, dtype=options.dtype)
        launch(build(studio), options.host, options.port)
    except (ShiraError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
