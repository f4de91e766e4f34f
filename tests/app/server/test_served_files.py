"""Copies of files and pictures that browsers fetch."""

import json
from pathlib import Path

import gradio as gr
from PIL import Image

from app.drawing.session import Session
from app.server.served_files import cached_picture
from app.settings.picture import METADATA_KEY


def test_a_picture_is_a_png_with_its_report_and_is_written_once(session: Session) -> None:
    paper = gr.Image(render=False)
    picture = session.generate("a red cat", {}, 3, 1)
    file = Path(cached_picture(paper, picture))
    with Image.open(file, formats=("png",)) as image:
        assert image.tobytes() == picture.image.tobytes()
        assert json.loads(image.info[METADATA_KEY]) == picture.report
    file.write_bytes(b"as a browser reads it")
    assert cached_picture(paper, picture) == str(file)
    assert file.read_bytes() == b"as a browser reads it"
