"""Well-kept models in place of a judge: CLIP and DINO, as DreamBooth's paper uses them (arXiv 2208.12242)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

from shira_diffusers.errors import ShiraError

CLIP = ("clip",)
DINO = ("dinov2", "vit", "dinov2_with_registers", "dinov3_vit")
Pictures = Sequence[Image.Image]


class Scorer:
    """Compares pictures with texts and with other pictures.

    Args:
        clip, dino: folders of a ``CLIPModel`` and of a ``Dinov2Model`` or ``ViTModel``, with their processors.

    Raises:
        ShiraError: a folder that holds something else.
    """

    def __init__(self, clip: str, dino: str | None, device: str) -> None:
        self._device = device
        self._clip = _load(clip, "--clip", CLIP, AutoProcessor, device)
        self._dino = _load(dino, "--dino", DINO, AutoImageProcessor, device) if dino else None

    def score(
        self, pictures: Pictures, texts: Sequence[str], asked: Sequence[int], styles: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Any]:
        """Score pictures, one number a picture each.

        Args:
            texts: all that are asked for, without a style; `asked` says which of them a picture should show.
            styles: training pictures by style, as `looks` sees them.

        Returns:
            "clip_t", the cosine of picture and text; "named", 1 where no other text is nearer; "clip_i" and "dino" by
            style, the mean cosine with its training pictures.
        """
        seen, words = self._compared(pictures, texts)
        cosines, wanted = seen["clip_i"] @ words.T, torch.tensor(asked, device=words.device)
        scores: dict[str, Any] = {
            "clip_t": _rounded(cosines.gather(1, wanted[:, None])[:, 0]),
            "named": (cosines.argmax(1) == wanted).int().tolist(),
        }
        for kind, own in seen.items():
            scores[kind] = {name: _rounded((own @ known[kind].T).mean(1)) for name, known in styles.items()}
        return scores

    def looks(self, pictures: Pictures) -> dict[str, Tensor]:
        """Unit vectors of pictures, ``[n, width]``: "clip_i" and, with a DINO, "dino"."""
        return self._compared(pictures, [""])[0]

    @torch.no_grad()
    def _compared(self, pictures: Pictures, texts: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        model, read = self._clip
        options = {"images": list(pictures), "return_tensors": "pt"}
        given = read(text=list(texts), padding=True, truncation=True, **options)
        found = model(**given.to(self._device))
        seen = {"clip_i": found.image_embeds}
        if self._dino:
            model, read = self._dino
            hidden = model(**read(**options).to(self._device)).last_hidden_state
            seen["dino"] = F.normalize(hidden[:, 0], dim=1)  # the class token
        return seen, found.text_embeds


def _load(folder: str, flag: str, kinds: tuple[str, ...], processor: Any, device: str) -> tuple[Any, Any]:
    try:
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if kind in kinds:
            return AutoModel.from_pretrained(folder).to(device).eval(), processor.from_pretrained(folder)
        found: object = f"a model of type {kind!r}"
    except (OSError, ValueError) as error:
        found = error
    raise ShiraError(
        f"{flag}: expected a folder with a model of type {' or '.join(kinds)} and its processor, as save_pretrained "
        f"writes them, got {folder!r}: {found}; name another folder"
    )


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
