"""The page, put together: header, mixer, endpoints."""

from typing import Any

import gradio as gr

from app import look
from app.api import add_api
from app.mixer import Mixer
from app.session import Session

CACHE_SECONDS = 24 * 60 * 60  # pictures that nobody fetched for a day leave the disk


def build(session: Session) -> gr.Blocks:
    """The app over a session, to be served with ``launch``."""
    with gr.Blocks(
        title="SHiRA mixer",
        analytics_enabled=False,
        delete_cache=(CACHE_SECONDS, CACHE_SECONDS),
    ) as blocks:
        gr.HTML(look.header(session.model, len(session.cards)), elem_id="header", padding=False)
        Mixer(session).lay_out()
        add_api(session)
    return blocks


def launch(blocks: gr.Blocks, host: str, port: int, **options: Any) -> str:
    """Serve the app; returns its address (at once, if ``prevent_thread_lock=True`` is among the options)."""
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        theme=look.theme(),
        css_paths=[look.CSS],
        footer_links=["api"],
        share=False,
        ssr_mode=False,
        **options,
    )
    return url
