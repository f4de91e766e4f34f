"""The page, put together: header, tabs, endpoints."""

from typing import Any

import gradio as gr

from app import look
from app.api import add_api
from app.api_library import add_library_api
from app.api_pictures import add_pictures_api
from app.studio import Studio
from app.tabs.interference import InterferenceTab
from app.tabs.library import LibraryTab
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
            tabs: dict[str, Any] = {
                "Mix": mix,
                "Interference": InterferenceTab(studio),
                "Library": LibraryTab(studio),
            }
            for name, tab in tabs.items():  # in the order Mix, Compare, Interference, Train, Library, History
                with gr.Tab(name, id=name.lower()) as shown:
                    tab.lay_out()
                if hasattr(tab, "refresh_on"):
                    tab.refresh_on(shown)
        add_api(studio)
        add_pictures_api(studio)
        add_library_api(studio)
    return blocks


def launch(blocks: gr.Blocks, host: str, port: int, **options: Any) -> str:
    """Serve the app; returns its address (at once, if ``prevent_thread_lock=True`` is among the options)."""
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        theme=look.theme(),
        css_paths=[look.CSS, *sorted(look.CSS.parent.glob("css/*.css"))],
        footer_links=["api"],
        share=False,
        ssr_mode=False,
        **options,
    )
    return url
