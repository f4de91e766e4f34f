"""Parse the command line of ``python -m app``, and start what it asks for."""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from app.drawing.base_model import DTYPES
from app.history.history import MOST
from app.library.uploads import DEFAULT_MAX_MB
from app.page.page import build, launch
from app.server.access import is_local, protection, read_credentials, warn_if_open
from app.server.address import require_address
from app.studio import Studio, default_data
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
    parser.add_argument(
        "--max-upload-mb",
        type=float,
        default=DEFAULT_MAX_MB,
        metavar="MB",
        help="of a file that a visitor sends (default: %(default)s)",
    )
    parser.add_argument(
        "--history", type=int, default=MOST, metavar="N", help="pictures that a history keeps (default: %(default)s)"
    )
    parser.add_argument(
        "--gallery",
        choices=("auto", "shared", "own"),
        default="auto",
        help="who sees a picture: everybody, or who has drawn it; auto: own with --auth, --share or a --host that "
        "others reach, or else shared (default: %(default)s)",
    )
    parser.add_argument("--share", action="store_true", help="also serve the app at a public link, through Gradio")
    parser.add_argument(
        "--auth", metavar="USER:PASSWORD", help="ask visitors to sign in; the list of processes shows it"
    )
    parser.add_argument(
        "--auth-file", type=Path, metavar="FILE", help="the same from a file: a line USER:PASSWORD per user"
    )
    return parser.parse_args(arguments)


def _require_sensible(options: argparse.Namespace) -> None:
    """Raises ShiraError for an option that cannot work; loading a model first would be time lost."""
    if options.history < 1:
        raise ShiraError(f"--history must be a number from 1, got {options.history}")
    if not 0 < options.max_upload_mb <= 1e6:
        raise ShiraError(f"--max-upload-mb must be a number up to 1000000, got {options.max_upload_mb}")
    try:
        options.data.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.data).close()
    except OSError as error:
        raise ShiraError(
            f"cannot write to {options.data}: {error.strerror}; name a folder of yours with --data"
        ) from error
    require_address(options.host, options.port)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted; what goes wrong at the start is one line."""
    options = parse(arguments)
    studio = None
    try:
        users = read_credentials(options.auth, options.auth_file)
        warn_if_open(options.host, share=options.share, guarded=users is not None)
        _require_sensible(options)
        alone = users is None and not options.share and is_local(options.host)
        studio = Studio.open(
            options.base,
            options.adapters,
            options.data,
            device=options.device,
            dtype=options.dtype,
            max_upload_mb=options.max_upload_mb,
            history=options.history,
            shared=options.gallery == "shared" or (options.gallery == "auto" and alone),
        )
        os.environ.setdefault("GRADIO_TEMP_DIR", str(options.data.resolve() / "cache"))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` comes to its turn
        launch(build(studio), options.host, options.port, share=options.share, auth=users, **protection(studio))
    except (ShiraError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        if studio:
            studio.close()
