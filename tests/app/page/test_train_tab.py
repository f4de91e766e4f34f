"""What the Train tab offers."""

from app.page.tabs.train import MASKS
from shira_diffusers.masks.families import FAMILIES


def test_the_tab_offers_every_mask_family_once() -> None:
    names = [name for _, name in MASKS]
    assert sorted(names) == sorted(FAMILIES)
