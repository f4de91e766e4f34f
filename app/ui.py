"""The page, put together: header, tabs, endpoints."""

from typing import Any

import gradio as gr

from app import look
from app.api import add_api
from app.studio import Studio
from app.tabs.mix import MixTab

CACHE_SECONDS = 24 * 60 * 60  # pictures that nobody fetched for a day leave the disk


def build(studio: Studio) -> gr.Blocks:
    """The app over a studio, to be served with ``launch``."""
    with gr.Blocks(
        title="SHiRA style studio",
        analytics_enabled=False,
        delete_cache=(CACHE_SECONDS, CACHE_SECONDS),
    ) as blocks:
        session = studio.session
        gr.HTML(look.header(session.model, len(session.cards)), elem_id="header", padding=False)
        with gr.Tabs(elem_id="tabs"):
            mix = MixTab(studio)
            for name, tab in {"Mix": mix}.items():  # in the order Mix, Compare, Interference, Train, Library, History
                with gr.Tab(name, id=name.lower()):
                    tab.lay_out()
        add_api(studio)
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
