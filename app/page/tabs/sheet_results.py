"""What Compare and Series draw: a sheet that fills picture by picture, and files to take away."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr

from app.drawing.requests import Stopped
from app.history.archive import write_sheet
from app.page import sheet_view, theme
from app.page.tabs.events import TELLING, at_most_often, picked
from app.page.tabs.mix import MixTab
from app.server.messages import readable
from app.server.served_files import cached
from app.server.visitors import visitor_of
from app.settings.sheets import Sheet
from app.studio import Studio

CHOOSE = "Choose a picture to see it large."


class SheetResults:
    """The components of a sheet and what they do.

    ``outputs`` are those that ``draw`` updates; ``names`` holds the pictures' names in History.

    Args:
        task: how it is told to ``DrawingRequests``, and the id of the sheet in the page.
    """

    def __init__(self, studio: Studio, mix: MixTab, task: str) -> None:
        self._studio, self._mix, self.task = studio, mix, task

    def lay_out(self) -> None:
        """Add the components to the Blocks that is being built."""
        self.names: gr.State = gr.State([])
        self.view = sheet_view.make_sheet_view(self.task, "Pictures")
        self.said = gr.HTML(theme.remark(""), elem_id=f"{self.task}-told", padding=False)
        with gr.Row():
            self.sheet = gr.DownloadButton("Download the sheet", interactive=False, min_width=120)
            self.zip = gr.DownloadButton("Download all as a zip", interactive=False, min_width=120)
        self.outputs = [self.view, self.names, self.said, self.sheet, self.zip]
        self.view.send(self._send, self.names, self._mix.targets, **TELLING)

    async def draw(
        self, plan: Callable[[], Sheet], request: gr.Request, progress: gr.Progress
    ) -> AsyncIterator[list[Any]]:
        """Draw a sheet; yields updates of ``outputs``, and says in a sentence what goes wrong.

        Args:
            plan: what to draw; may raise SettingsError.
            progress: shows the steps.
        """
        paths: list[Path] = []

        def on_step(step: int, of: int) -> None:
            progress((step, of), desc=f"Drawing, {len(paths)} done", unit="steps")

        with readable():
            sheet = plan()
            for _, settings in sheet.cells:
                self._studio.session.drawable(settings)
            idle = gr.DownloadButton(interactive=False)
            yield [*self._shown(sheet, paths, f"0 of {len(sheet.cells)} drawn."), idle, idle]
            stopped = ""
            try:
                visitor, steps = visitor_of(request), at_most_often(on_step)
                async for _, _, path in self._studio.requests.draw_series(visitor, sheet.cells, steps, self.task):
                    paths.append(path)
                    yield [*self._shown(sheet, paths, f"{len(paths)} of {len(sheet.cells)} drawn."), idle, idle]
            except Stopped:
                stopped = f"Stopped, {len(paths)} of {len(sheet.cells)} drawn. "
            shared = f"In each picture: {sheet.shared}. {CHOOSE}" if paths else ""
            files = await self._files(sheet, paths)
            yield [*self._shown(sheet, paths, f"{stopped}{shared}"), *files]

    def _shown(self, sheet: Sheet, paths: list[Path], said: str) -> list[Any]:
        return [sheet_view.shown(sheet, paths), [path.name for path in paths], theme.remark(said)]

    async def _files(self, sheet: Sheet, paths: list[Path]) -> list[Any]:
        """The download buttons, for what was drawn."""
        if not paths:
            return [gr.skip(), gr.skip()]
        with tempfile.TemporaryDirectory() as folder:
            files = await asyncio.to_thread(write_sheet, sheet, paths, Path(folder))
            return [gr.DownloadButton(value=cached(self.sheet, file), interactive=True) for file in files]

    def _send(self, names: list[str], event: gr.EventData, request: gr.Request) -> list[Any]:
        return self._mix.fill_from_history(picked(names, event), request)
