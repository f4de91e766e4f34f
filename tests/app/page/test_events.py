"""What the events of the tabs have in common."""

from app.page.tabs.events import at_most_often


def test_steps_are_shown_no_more_often_than_asked_and_the_last_always() -> None:
    shown: list[tuple[int, int]] = []
    on_step = at_most_often(lambda done, of: shown.append((done, of)), seconds=60)
    for done in range(1, 11):
        on_step(done, 10)
    assert shown == [(1, 10), (10, 10)]
    on_step = at_most_often(lambda done, of: shown.append((done, of)), seconds=0)
    on_step(3, 10)
    on_step(4, 10)
    assert shown[2:] == [(3, 10), (4, 10)]
