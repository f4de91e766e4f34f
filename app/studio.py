"""All that the app is made of, opened together: the session and the folder that everything written lies in."""

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from platformdirs import user_data_path

from app.drawing.base_model import Dtype
from app.drawing.fair_queue import BACKGROUND
from app.drawing.requests import DrawingRequests
from app.drawing.session import Session
from app.drawing.thumbnails import Thumbnails
from app.history.galleries import Galleries
from app.history.history import MOST
from app.history.presets import Presets
from app.insight.interference import Comparer
from app.insight.lora_timing import Timings, timings
from app.library.uploads import DEFAULT_MAX_MB
from app.training.estimate import Estimator
from app.training.recipe import Base
from app.training.trainings import Trainings


def default_data() -> Path:
    """Where the app keeps what it writes, by default."""
    return user_data_path("shira-studio", appauthor=False)


@dataclass(frozen=True, slots=True)
class Studio:
    """What the tabs and endpoints work on.

    Args:
        session: draws pictures.
        data: the folder for all that the app writes.
        trainings: trains adapters, and ``estimator`` says what that will take.
        comparer: how much adapters interfere.
        max_upload_mb: of a file that a visitor sends.
        galleries: the pictures that were drawn, ``presets`` the settings that were saved, in the data folder.
        thumbnails: of the adapters.
        requests: draws for visits.
        measured: what a switch and a LoRA's fuse take here; measured when nobody draws.
    """

    session: Session
    data: Path
    trainings: Trainings
    estimator: Estimator
    comparer: Comparer
    galleries: Galleries
    presets: Presets
    thumbnails: Thumbnails
    requests: DrawingRequests
    measured: Future[Timings | None]
    max_upload_mb: float = DEFAULT_MAX_MB

    @property
    def timings(self) -> Timings | None:
        """What a switch and a LoRA's fuse of the same weights take here; None while that is not known."""
        known = self.measured.done() and not self.measured.cancelled() and not self.measured.exception()
        return self.measured.result() if known else None

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
        history: int = MOST,
        shared: bool = True,
    ) -> Self:
        """Load a pipeline and its adapters, and make the data folder.

        Args:
            base: a pipeline's folder, or a Hub id.
            adapters: a folder of adapters, only read.
            data: made if needed.
            device: as torch names it.
            dtype: of the weights.
            max_upload_mb: of a file that a visitor sends.
            history: pictures that a history keeps.
            shared: whether everybody sees all pictures, or each visitor those of his own.

        Raises:
            ShiraError: as ``Session.open``.
            OSError: the data folder cannot be made.
        """
        data.mkdir(parents=True, exist_ok=True)
        session = Session.open(base, adapters, data, device=device, dtype=dtype, max_upload_mb=max_upload_mb)
        session.look_at_all()
        trainings = Trainings(Base.of(session.pipe), session.library, data)
        galleries = Galleries(data / "pictures", most=history, shared=shared)
        return cls(
            session=session,
            data=data,
            trainings=trainings,
            estimator=Estimator(session, trainings),
            comparer=Comparer(session),
            galleries=galleries,
            presets=Presets(data / "presets.json"),
            thumbnails=Thumbnails(session, data / "thumbnails"),
            requests=DrawingRequests(session, galleries),
            measured=session.queue.submit(BACKGROUND, lambda: timings(session)),
            max_upload_mb=max_upload_mb,
        )

    def close(self) -> None:
        """End what was started, as the app ends."""
        self.session.close()
        self.trainings.close()
