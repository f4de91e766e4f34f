"""Draw random settings, for “Surprise me”."""

import random

from app.drawing.session import Session
from app.settings.settings import MAX_SEED, Settings

MOST = 3  # adapters in a mix


def settings(session: Session) -> Settings:
    """A suggested prompt, a seed and up to three adapters, at random."""
    chance = random.SystemRandom()
    names = session.adapter_names
    chosen = chance.sample(names, min(len(names), chance.randint(1, MOST)))
    mix = {name: round(chance.uniform(0.4, 1.1), 2) for name in chosen}
    return session.checked(chance.choice(session.suggestions), mix, chance.randint(0, min(MAX_SEED, 999_999)))
