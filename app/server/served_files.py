"""Files handed to browsers: copies in Gradio's cache, so that none of the app's own folders is ever served."""

from pathlib import Path
from urllib.parse import quote

from gradio.components.base import Component
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder


def cached(component: Component, file: Path) -> str:
    """The path of a copy that may be fetched through ``component``."""
    return save_file_to_cache(file, component.GRADIO_CACHE)


def address(file: Path) -> str:
    """Where a browser gets a copy, relative to the page."""
    return f"gradio_api/file={quote(save_file_to_cache(file, get_upload_folder()))}"
