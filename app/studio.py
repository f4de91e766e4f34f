"""All that the app is made of, opened together: the session and the folder that everything written lies in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from platformdirs import user_data_path

from app.estimate import Estimator
from app.loading import Dtype
from app.recipe import Base
from app.session import Session
from app.trainings import Trainings
from app.uploads import DEFAULT_MAX_MB


def default_data() -> Path:
    """Where the app keeps what it writes, if nobody names another folder."""
    return user_data_path("shira-studio", appauthor=False)


@dataclass(frozen=True, slots=True)
class Studio:
    """What the tabs and endpoints work on.

    Args:
        session: draws pictures.
        data: the folder for all that the app writes.
        trainings: trains adapters, and ``estimator`` says what that will take.
        max_upload_mb: of a file that a visitor sends.
    """

    session: Session
    data: Path
    trainings: Trainings
    estimator: Estimator
    max_upload_mb: float = DEFAULT_MAX_MB

    @classmethod
    def open(
        cls,
        base: str,
        adapters: Path,
        data: Path,
        *,
        device: str = "cpu",
        dtype: Dtype = "float32",
        max_upload_mb: float = DEFAULT_MAX_MB,
    ) -> Self:
        """Load a pipeline and its adapters, and make the data folder.

        Args:
            base: a pipeline's folder, or a Hub id.
            adapters: a folder of adapters, only read.
            data: made if needed.
            device: as torch names it.
            dtype: of the weights.
            max_upload_mb: of a file that a visitor sends.

        Raises:
            ShiraError: as ``Session.open``.
            OSError: the data folder cannot be made.
        """
        data.mkdir(parents=True, exist_ok=True)
        session = Session.open(base, adapters, data, device=device, dtype=dtype, max_upload_mb=max_upload_mb)
        trainings = Trainings(Base.of(session.pipe), session.library, data)
        return cls(session, data, trainings, Estimator(session, trainings), max_upload_mb)

    def close(self) -> None:
        """End what was started, as the app ends."""
        self.trainings.close()
