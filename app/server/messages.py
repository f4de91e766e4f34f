"""Errors as the user reads them: one sentence, never a stack trace."""

import html
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
from gradio.exceptions import InvalidPathError
from pydantic import ValidationError

from app.drawing.requests import Stopped
from app.library.cards import one_sentence
from shira_diffusers import ShiraError

logger = logging.getLogger(__name__)


@contextmanager
def readable(failed: str = "the picture could not be drawn") -> Iterator[None]:
    """Turn what goes wrong inside into a ``gr.Error`` of one sentence; the log keeps what is not the user's doing.

    Args:
        failed: how the sentence begins where the error is not the user's doing.
    """
    try:
        yield
    except gr.Error:  # a ValueError, and already a sentence
        raise
    except ShiraError as error:
        raise gr.Error(_begun(one_sentence(error)), print_exception=False) from error
    except (RuntimeError, ValueError, OSError, MemoryError) as error:
        raise _fault(failed, error) from error


class Page(gr.Blocks):
    """Blocks that also put into a sentence what Gradio itself refuses, and unexpected errors."""

    async def process_api(self, block_fn: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Every event and every call comes through here.

        The page renders the sentence as HTML, so ``<``, ``>`` and ``&`` are escaped there; programs get it as it is.
        """
        event = self.fns[block_fn] if isinstance(block_fn, int) else block_fn
        try:
            with _sentences():
                return await super().process_api(block_fn, *args, **kwargs)
        except gr.Error as error:
            if event.api_visibility != "public":
                error.message = html.escape(error.message, quote=False)
            raise


@contextmanager
def _sentences() -> Iterator[None]:
    """Turn what Gradio refuses, a stop and the unexpected into a ``gr.Error`` of one sentence."""
    try:
        yield
    except gr.Error:
        raise
    except Stopped as error:
        raise gr.Error("The drawing was stopped", print_exception=False) from error
    except (InvalidPathError, ValidationError) as error:
        logger.info("refused: %s", one_sentence(error))
        sentence = "A file must be uploaded first: send it as gradio_client's handle_file(path) does, not as a path"
        raise gr.Error(sentence, print_exception=False) from error
    except Exception as error:
        raise _fault("the app could not do that", error) from error


def _fault(failed: str, error: Exception) -> gr.Error:
    """What is not the user's doing: all of it goes to the log, and a sentence without folders to the user."""
    logger.error(failed, exc_info=error)
    reason = (error.strerror if isinstance(error, OSError) else "") or one_sentence(error)
    return gr.Error(_begun(f"{failed}: {reason}; see the log of the app for details"), print_exception=False)


def _begun(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
