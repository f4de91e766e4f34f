"""The library's endpoints for programs: ``/library``, ``/upload_adapter``, ``/inspect_adapter`` and their family."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import api

from app.library.cards import shown_metadata
from app.server.messages import readable
from app.server.served_files import cached
from app.server.visitors import COMPARING
from app.settings.checks import SettingsError
from app.studio import Studio


def add_library_api(studio: Studio) -> None:
    """Add the endpoints to the Blocks that is being built."""
    library = studio.session.library

    def listed() -> list[dict[str, Any]]:
        """All adapters: name, origin ("bundled" or "yours"), whether it fits the model and, if not, the reason."""
        return [entry.as_dict() for entry in library.entries]

    def upload_adapter(file: str, name: str) -> dict[str, Any]:
        """Add a .safetensors file (this project's, or PEFT's SHiRA adapter_model.safetensors) to the library.

        Returns the entry; an adapter that does not fit the model is kept, with fits = false and the reason.

        Args:
            file: The .safetensors file, as handle_file(path).
            name: That it is to have; tidied, and numbered if it is taken; an empty one is the file's.
        """
        with readable("the adapter could not be taken in"):
            return library.add(_required(file), name or None).as_dict()

    def upload_peft_adapter(file: str, config: str, name: str) -> dict[str, Any]:
        """Add PEFT's SHiRA adapter_model.safetensors with its adapter_config.json, which has base and mask.

        The two become one file of this project. Otherwise as /upload_adapter.

        Args:
            file: The .safetensors file, as handle_file(path).
            config: The adapter_config.json, as handle_file(path).
            name: That it is to have; tidied, and numbered if it is taken; an empty one is the file's.
        """
        with readable("the adapter could not be taken in"):
            return library.add(_required(file), name or None, _required(config)).as_dict()

    def convert_lora(file: str, name: str) -> dict[str, Any]:
        """Convert a LoRA for this model (diffusers, kohya) to an adapter of 2 % of the entries, and add that.

        Otherwise as /upload_adapter. The entry's metadata says how much of the LoRA's update (energy_kept) and of its
        effect on a few pictures (effect_kept) is kept.

        Args:
            file: The .safetensors file, as handle_file(path).
            name: That it is to have; tidied, and numbered if it is taken; an empty one is the file's.
        """
        with readable("the LoRA could not be converted"):
            return library.convert(_required(file), name or None).as_dict()

    def inspect_adapter(name: str) -> dict[str, Any]:
        """What an adapter's file holds: metadata, and shape, entries and density of each layer.

        Args:
            name: Of the adapter.
        """
        with readable("the adapter could not be read"):
            found = library.inspect(name).as_dict()
        path = Path(found.pop("path"))  # clients take whatever has a path for a file to fetch
        return {"name": path.stem, **found, "metadata": shown_metadata(found["metadata"])}

    def rename_adapter(name: str, new_name: str) -> dict[str, Any]:
        """Give an adapter that was added in the app another name; returns its entry.

        Args:
            name: Of the adapter.
            new_name: Tidied, slashes become dashes; refused if it is taken.
        """
        with readable("the adapter could not be renamed"):
            return library.rename(name, new_name).as_dict()

    def delete_adapter(name: str) -> list[str]:
        """Delete an adapter that was added in the app; returns the names that /undo_delete can bring back.

        Args:
            name: Of the adapter.
        """
        with readable("the adapter could not be deleted"):
            library.delete(name)
        return list(library.deleted)

    def undo_delete(name: str = "") -> dict[str, Any]:
        """Bring back the adapter that was deleted last, or the last of a name; returns its entry.

        Args:
            name: Of the adapter; an empty one is that of the last.
        """
        with readable("the adapter could not be brought back"):
            return library.undo(name or None).as_dict()

    def download_adapter(name: str) -> str:
        """The file of an adapter.

        Args:
            name: Of the adapter.
        """
        with readable("the adapter could not be read"):
            return cached(out, library.entry(name).file)

    def interference(adapters: list[str]) -> list[dict[str, Any]]:
        """How much loaded adapters, two to six of them, interfere, per pair.

        In words and figures, over all and per layer: overlap (shared entries, as a fraction of the smaller one's),
        sign_conflict (of those, the fraction that pull in opposite directions), awom and awor (norm and empty share of
        the product of the two changes), l2 (distance).

        Args:
            adapters: Their names.
        """
        with readable("the adapters could not be compared"):
            return [pair.as_dict() for pair in studio.comparer.compare(adapters)]

    api(listed, api_name="library")
    api(interference, api_name="interference", **COMPARING)
    for endpoint in (inspect_adapter, rename_adapter, delete_adapter, undo_delete):
        api(endpoint, api_name=endpoint.__name__)
    # files go through components, which take those that the client has uploaded, and no other path
    file = gr.File(label="file", type="filepath", visible=False)
    config = gr.File(label="config", type="filepath", visible=False)
    name, named = gr.Textbox("", label="name", visible=False), gr.Textbox(label="name", visible=False)
    entry, out = gr.JSON(label="entry", visible=False), gr.File(label="file", visible=False)
    gr.Button(visible=False).click(upload_adapter, [file, name], entry, api_name="upload_adapter")
    gr.Button(visible=False).click(convert_lora, [file, name], entry, api_name="convert_lora")
    gr.Button(visible=False).click(upload_peft_adapter, [file, config, name], entry, api_name="upload_peft_adapter")
    gr.Button(visible=False).click(download_adapter, named, out, api_name="download_adapter")


def _required(file: str | None) -> Path:
    if not file:
        raise SettingsError("no file was sent")
    return Path(file)
