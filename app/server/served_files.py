"""Files handed to browsers: copies in Gradio's cache, so that none of the app's own folders is ever served."""

import tempfile
from mimetypes import guess_type
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from gradio.components.base import Component
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from app.history.png_metadata import write_png
from app.settings.picture import Picture


def cached(component: Component, file: Path) -> str:
    """The path of a copy that may be fetched through ``component``."""
    return save_file_to_cache(file, component.GRADIO_CACHE)


def file_data(component: Component, file: Path) -> dict[str, Any]:
    """What a client of the API gets in place of a file."""
    return gr.FileData(path=cached(component, file), mime_type=guess_type(file)[0]).model_dump()


def cached_picture(component: Component, picture: Picture) -> str:
    """The path of a PNG with its report, for a picture that has no file.

    Gradio itself, handed an image, overwrites the file of the same pixels even while a browser is reading it.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.png"
        write_png(picture, file)
        return cached(component, file)


def address(file: Path) -> str:
    """Where a browser gets a copy, relative to the page."""
    return f"gradio_api/file={quote(save_file_to_cache(file, get_upload_folder()))}"
