"""Who sees which pictures, and how many are kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client.exceptions import AppError
from PIL import Image

from app.history.galleries import CHECKED_EVERY, Galleries, Visitor
from app.history.history import History, Kept
from app.server.access import BROWSER
from app.server.visitors import visitor_of
from app.settings.checks import SettingsError
from app.settings.picture import Picture
from app.studio import Studio
from tests.app.conftest import SUGGESTION, Folders, connect, served

PICTURE = Picture(Image.new("RGB", (8, 8)), {"prompt": SUGGESTION, "mix": {}})
ADA, BOB = Visitor("1", "user ada"), Visitor("2", "user bob")


def names(history: History) -> list[str]:
    return [kept.name for kept in history.page(1, 10**6)]


def test_the_oldest_pictures_go(tmp_path: Path) -> None:
    (tmp_path / "00000000-note.png").write_bytes(b"not of the history")
    history = History(tmp_path, most=3)
    added = [history.add(PICTURE).name for _ in range(5)]
    assert names(history) == names(History(tmp_path)) == added[:1:-1]
    assert (tmp_path / "00000000-note.png").exists()


def test_favourites_stay_longest_and_are_found(tmp_path: Path) -> None:
    history = History(tmp_path, most=3)
    first = history.add(PICTURE)
    history.star(first.name, on=True)
    assert first.favourite and names(History(tmp_path)) == [first.name]
    others = [history.add(PICTURE).name for _ in range(4)]
    assert names(history) == [others[3], others[2], first.name]
    assert [kept.name for kept in history.find(favourites=True)] == [first.name]
    history.star(first.name, on=False)
    assert history.find(favourites=True) == ()
    history.star(first.name, on=True)
    history.delete(first.name)
    assert not list(tmp_path.glob("*.star"))
    with pytest.raises(SettingsError, match="no picture named"):
        history.star("../x.png", on=True)


def test_a_search_finds_all_its_words(tmp_path: Path) -> None:
    history = History(tmp_path)
    image = Image.new("RGB", (8, 8))
    reports: list[dict[str, Any]] = [
        {"prompt": "A red Fox", "mix": {"bluefire": 1.0}, "seed": 7},
        {"prompt": "a red owl", "mix": {"gold": 0.5}, "seed": 8, "negative": "dark"},
        {"prompt": "a fox", "mix": {}, "seed": 77},
    ]
    kept = [history.add(Picture(image, report)) for report in reports]
    kept[2].path.write_bytes(b"replaced by another")
    found = {words: [history_name(kept, each) for each in history.find(words)] for words in (
        "", "red", "FOX red", "gold", "seed 7", "dark owl", "castle",
    )}  # fmt: skip
    assert found == {
        "": [2, 1, 0], "red": [1, 0], "FOX red": [0], "gold": [1], "seed 7": [0], "dark owl": [1], "castle": [],
    }  # fmt: skip


def history_name(kept: list[Kept], each: Kept) -> int:
    return [one.name for one in kept].index(each.name)


def test_all_pictures_together_have_a_size(tmp_path: Path) -> None:
    size = History(tmp_path / "one").add(PICTURE).path.stat().st_size
    folder = tmp_path / "pictures"
    galleries = Galleries(folder, max_bytes=5 * size, shared=False)
    (folder / "of").mkdir(parents=True)
    (folder / "0.png").write_bytes(b"not of the history" * size)
    (folder / "20200101-000000-000000000.png").symlink_to(folder / "deleted meanwhile")
    kept = [galleries.add((ADA, BOB)[k % 2], PICTURE).name for k in range(CHECKED_EVERY)]
    assert sorted([*names(galleries.of(ADA)), *names(galleries.of(BOB))]) == kept[-5:]
    assert (folder / "0.png").exists()


def test_favourites_stay_longest_when_all_pictures_together_are_too_many(tmp_path: Path) -> None:
    size = History(tmp_path / "one").add(PICTURE).path.stat().st_size
    galleries = Galleries(tmp_path / "pictures", max_bytes=5 * size, shared=False)
    first = galleries.add(ADA, PICTURE).name
    galleries.of(ADA).star(first, on=True)
    kept = [galleries.add(BOB, PICTURE).name for _ in range(CHECKED_EVERY - 1)]
    assert names(galleries.of(ADA)) == [first] and names(galleries.of(BOB)) == kept[:-5:-1]


def test_visitors_share_a_gallery_or_have_their_own(tmp_path: Path) -> None:
    shared, own = Galleries(tmp_path, shared=True), Galleries(tmp_path, shared=False)
    everybodys = shared.add(ADA, PICTURE).name
    assert names(shared.of(BOB)) == [everybodys]
    (hers,) = [own.add(ADA, PICTURE).name]
    assert names(own.of(ADA)) == [hers] and names(own.of(BOB)) == []
    assert names(Galleries(tmp_path, shared=False).of(Visitor("3", "user ada"))) == [hers]  # after a restart
    assert names(shared.of(ADA)) == [everybodys]
    assert not [path for path in tmp_path.rglob("*") if "ada" in path.name]


@pytest.fixture(scope="module")
def private(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    studio = Studio.open(str(folders.base), folders.adapters, tmp_path_factory.mktemp("own"), shared=False)
    yield studio
    studio.close()


def test_who_signs_in_sees_the_pictures_of_that_name(private: Studio) -> None:
    users = [("ada", "engine"), ("bob", "builder")]
    with served(private, auth=users) as url:
        ada, bob = (connect(url, auth=user) for user in users)
        ada.predict(SUGGESTION, {}, 3, 1, api_name="/generate")
        (hers,) = ada.predict(api_name="/history")
        assert bob.predict(api_name="/history") == []
        with pytest.raises(AppError, match="No picture named"):
            bob.predict(hers["name"], api_name="/delete_picture")
        bob.predict(SUGGESTION, {}, 4, 1, api_name="/generate")
        assert [picture["settings"]["seed"] for picture in bob.predict(api_name="/history")] == [4]
        assert [picture["name"] for picture in connect(url, auth=users[0]).predict(api_name="/history")] == [
            hers["name"]
        ]
        assert ada.predict(hers["name"], api_name="/delete_picture") == 0


def test_a_browser_is_known_by_a_cookie_where_histories_are_not_shared(private: Studio, url: str) -> None:
    assert BROWSER not in httpx.get(url).cookies
    with served(private) as own:
        first, second = httpx.get(own), httpx.get(own)
        assert first.cookies[BROWSER] != second.cookies[BROWSER] and len(first.cookies[BROWSER]) >= 32
        assert "HttpOnly; SameSite=Lax" in first.headers["set-cookie"]
        assert "set-cookie" not in httpx.get(own, cookies={BROWSER: first.cookies[BROWSER]}).headers
        assert "Only you see these pictures" in first.text and "Everybody" not in first.text


def test_whose_a_picture_is() -> None:
    class Sent:
        cookies = {BROWSER: "x"}  # noqa: RUF012

    from gradio import Request

    assert visitor_of(Request(Sent(), username="ada", session_hash="7")) == Visitor("7", "user ada")  # type: ignore[arg-type]
    assert visitor_of(Request(Sent(), session_hash="7")) == Visitor("7", "browser x")  # type: ignore[arg-type]
    assert visitor_of(Request(session_hash="7")) == Visitor("7", "visit 7")
