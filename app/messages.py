"""Errors as the user reads them: one sentence, never a stack trace."""

import html
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from app.cards import one_sentence
from shira_diffusers import ShiraError

logger = logging.getLogger(__name__)


@contextmanager
def readable(failed: str = "the picture could not be drawn") -> Iterator[None]:
    """Turn what goes wrong inside into a ``gr.Error`` of one sentence; the log keeps what is not the user's doing.

    Args:
        failed: how the sentence begins where the error is not the user's doing.

    Gradio renders the sentence as HTML, so ``<``, ``>`` and ``&`` are escaped.
    """
    try:
        yield
    except ShiraError as error:
        raise gr.Error(_shown(one_sentence(error)), print_exception=False) from error
    except (RuntimeError, ValueError, OSError, MemoryError) as error:
        logger.exception(failed)
        sentence = f"{failed}: {one_sentence(error)}; the log of the app tells more"
        raise gr.Error(_shown(sentence), print_exception=False) from error


def _shown(sentence: str) -> str:
    return html.escape(sentence[:1].upper() + sentence[1:], quote=False)
