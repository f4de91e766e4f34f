"""All that the app is made of, opened together: the session and the folder that everything written lies in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from platformdirs import user_data_path

from app.loading import Dtype
from app.session import Session


def default_data() -> Path:
    """Where the app keeps what it writes, if nobody names another folder."""
    return user_data_path("shira-studio", appauthor=False)


@dataclass(frozen=True, slots=True)
class Studio:
    """What the tabs and endpoints work on.

    Args:
        session: draws pictures.
        data: the folder for all that the app writes.
    """

    session: Session
    data: Path

    @classmethod
    def open(cls, base: str, adapters: Path, data: Path, *, device: str = "cpu", dtype: Dtype = "float32") -> Self:
        """Load a pipeline and its adapters, and make the data folder.

        Args:
            base: a pipeline's folder, or a Hub id.
            adapters: a folder of adapters, only read.
            data: made if needed.
            device: as torch names it.
            dtype: of the weights.

        Raises:
            ShiraError: as ``Session.open``.
            OSError: the data folder cannot be made.
        """
        data.mkdir(parents=True, exist_ok=True)
        return cls(Session.open(base, adapters, data, device=device, dtype=dtype), data)
