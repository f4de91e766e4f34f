"""Check picture files that visitors send, before anything else reads them."""

import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from shira_diffusers.dreambooth.pictures import DAMAGED

MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_TOO_LARGE = f"expected at most {MAX_PIXELS // 10**6} million pixels"


def problem_of(path: Path) -> str:
    """Why a file is no picture that can be used, or nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    return _TOO_LARGE
                opened.load()
    except Image.DecompressionBombError:
        return _TOO_LARGE
    except UnidentifiedImageError:
        return f"not a picture of {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    except DAMAGED as error:
        return f"damaged: {str(error).splitlines()[0][:80] if str(error) else type(error).__name__}"
    return ""
