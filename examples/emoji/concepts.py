"""What the model can draw: emoji with short natural names, and named background colours.

Picked by hand so that shape alone tells any two apart: one heart, one book, one apple, and no faces that differ by a smile.
"""

from dataclasses import dataclass

_TABLE = """
🐵 monkey|🦍 gorilla|🐶 dog|🐺 wolf|🦊 fox|🦝 raccoon|🐱 cat|🦁 lion|🐯 tiger|🐆 leopard|🐴 horse|🦄 unicorn|🦓 zebra|🦌 deer
🐮 cow|🐷 pig|🐑 sheep|🐐 goat|🐪 camel|🦙 llama|🦒 giraffe|🐘 elephant|🦏 rhinoceros|🦛 hippopotamus|🐭 mouse|🐹 hamster
🐰 rabbit|🐿 chipmunk|🦔 hedgehog|🦇 bat|🐻 bear|🐨 koala|🐼 panda|🦥 sloth|🦨 skunk|🦘 kangaroo|🦃 turkey|🐔 chicken
🐓 rooster|🐣 chick|🐧 penguin|🕊 dove|🦅 eagle|🦆 duck|🦢 swan|🦉 owl|🦩 flamingo|🦚 peacock|🦜 parrot|🐸 frog|🐊 crocodile
🐢 turtle|🦎 lizard|🐍 snake|🐲 dragon|🦕 dinosaur|🐳 whale|🐬 dolphin|🐠 tropical fish|🐡 blowfish|🦈 shark|🐙 octopus
🐚 seashell|🐌 snail|🦋 butterfly|🐛 caterpillar|🐜 ant|🐝 bee|🐞 ladybug|🕷 spider|🦂 scorpion|🦀 crab|🦞 lobster|🦑 squid
💐 bouquet|🌸 cherry blossom|🌹 rose|🌻 sunflower|🌷 tulip|🌱 seedling|🌲 pine tree|🌳 tree|🌴 palm tree|🌵 cactus
🍀 clover|🍁 maple leaf|🍄 mushroom|🍇 *grapes|🍉 watermelon|🍊 tangerine|🍋 lemon|🍌 banana|🍍 pineapple|🍎 red apple
🍐 pear|🍑 peach|🍒 *cherries|🍓 strawberry|🥝 kiwi|🍅 tomato|🥥 coconut|🥑 avocado|🍆 eggplant|🥔 potato|🥕 carrot|🌽 *corn
🌶 hot pepper|🥦 *broccoli|🧄 *garlic|🧅 onion|🍞 *bread|🥐 croissant|🥖 baguette|🥨 pretzel|🥞 *pancakes|🧇 waffle
🧀 *cheese|🍔 hamburger|🍟 *french fries|🍕 pizza|🌭 hot dog|🥪 sandwich|🌮 taco|🥚 egg|🍳 frying pan|🥗 salad|🍿 *popcorn
🍜 *noodles|🍝 *spaghetti|🍣 *sushi|🍦 *ice cream|🍩 donut|🍪 cookie|🎂 birthday cake|🍰 slice of cake|🧁 cupcake|🥧 pie
🍫 chocolate bar|🍭 lollipop|🍯 honey pot|🍼 baby bottle|☕ cup of coffee|🫖 teapot|🍷 glass of wine|🍸 cocktail|🍺 beer
🥤 soda|🧊 ice cube|🍴 fork and knife|🥄 spoon|🌍 globe|🧭 compass|🏔 mountain|🌋 volcano|⛺ tent|🏝 island|🏛 temple
🏠 house|🏭 factory|🏰 castle|🗼 tower|⛪ church|🕌 mosque|🎡 ferris wheel|🎪 circus tent|🚂 steam train|🚌 bus
🚑 ambulance|🚒 fire truck|🚓 police car|🚗 car|🚚 truck|🚜 tractor|🏎 racing car|🏍 motorcycle|🛵 scooter|🚲 bicycle
🛹 skateboard|🚦 traffic light|⚓ anchor|⛵ sailboat|🚢 ship|🛶 canoe|✈ airplane|🚁 helicopter|🚀 rocket|🛸 ufo
⏳ hourglass|⌚ watch|⏰ alarm clock|🌙 crescent moon|☀ sun|⭐ star|☁ cloud|🌈 rainbow|☂ umbrella|⚡ lightning bolt
❄ snowflake|⛄ snowman|🔥 *fire|💧 water drop|🌊 wave|🌪 tornado|🎃 pumpkin|🎄 christmas tree|🎈 balloon|🎁 gift|🎀 ribbon
🏆 trophy|🏅 medal|⚽ soccer ball|⚾ baseball|🏀 basketball|🏐 volleyball|🏈 football|🎾 tennis racket
🏓 ping pong paddle|🥊 boxing glove|⛸ ice skate|🎣 fishing rod|🎯 target|🪀 yoyo|🪁 kite|🎱 billiard ball
🔮 crystal ball|🎮 game controller|🕹 joystick|🎲 dice|🧩 puzzle piece|🧸 teddy bear|🎨 paint palette|🧵 spool of thread
🧶 *yarn|👓 *glasses|🕶 *sunglasses|👔 necktie|👕 shirt|👖 *jeans|🧣 scarf|🧤 *gloves|🧦 *socks|👗 dress|👜 handbag
🎒 backpack|👟 sneaker|🥾 boot|👠 high heel|👑 crown|🎩 top hat|🎓 graduation cap|🧢 baseball cap|💍 ring|💎 diamond
🔔 bell|🎷 saxophone|🪗 accordion|🎸 guitar|🎹 piano|🎺 trumpet|🎻 violin|🪕 banjo|🥁 drum|🎤 microphone|🎧 *headphones
📻 radio|📱 phone|☎ telephone|🔋 battery|💻 laptop|💾 floppy disk|🎥 movie camera|📺 television|📷 camera
🔍 magnifying glass|🕯 candle|💡 light bulb|🔦 flashlight|🏮 lantern|📕 book|📜 scroll|💰 money bag|✉ envelope|📦 box
📫 mailbox|✏ pencil|🖍 crayon|📁 folder|📎 paperclip|✂ *scissors|🗑 trash can|🔒 lock|🔑 key|🔨 hammer|🪓 axe|⚔ *swords
🏹 bow and arrow|🛡 shield|🪚 saw|🔧 wrench|🪛 screwdriver|⚙ gear|⚖ balance scale|🧲 magnet|🪜 ladder|🔬 microscope
🔭 telescope|🚪 door|🛏 bed|🛋 couch|🪑 chair|🛁 bathtub|🧹 broom|🧺 basket|🧯 fire extinguisher|🛒 shopping cart|🚩 flag
💣 bomb|🪙 coin|🪣 bucket|👻 ghost|👽 alien|🤖 robot|💀 skull|👾 space invader|🤡 clown|🦷 tooth|🦴 bone|🧠 brain|👄 mouth
👣 *footprints|❤ heart|👍 thumbs up
"""


@dataclass(frozen=True)
class Concept:
    """One emoji: its character and the words for it."""

    emoji: str
    name: str
    countable: bool

    @property
    def phrase(self) -> str:
        """The name with its article: "a red apple", "an owl", "grapes"."""
        return with_article(self.name) if self.countable else self.name


def with_article(words: str) -> str:
    """Put "a" or "an" before `words`."""
    vowel = words[0] in "aeiou" and not words.startswith(("ufo", "unicorn"))
    return f"{'an' if vowel else 'a'} {words}"


def _parse(table: str) -> tuple[Concept, ...]:
    entries = (entry.split(" ", 1) for line in table.split("\n") if line for entry in line.split("|"))
    return tuple(Concept(emoji, name.lstrip("*"), not name.startswith("*")) for emoji, name in entries)


CONCEPTS: tuple[Concept, ...] = _parse(_TABLE)
CONCEPT_INDEX: dict[str, int] = {concept.name: i for i, concept in enumerate(CONCEPTS)}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (14, 14, 16),
    "gray": (130, 132, 136),
    "red": (200, 32, 38),
    "orange": (246, 136, 24),
    "yellow": (250, 218, 60),
    "lime": (168, 222, 66),
    "green": (36, 140, 62),
    "teal": (16, 136, 140),
    "cyan": (112, 210, 238),
    "blue": (40, 88, 214),
    "navy": (18, 26, 84),
    "purple": (122, 54, 172),
    "pink": (246, 152, 194),
    "brown": (116, 70, 40),
    "beige": (236, 216, 180),
}
"""sRGB, 0-255, by name."""

BACKGROUND_NAMES: tuple[str, ...] = tuple(BACKGROUNDS)


def is_held_out(concept: int, background: int) -> bool:
    """True for the one pair in 17 that training never shows: a test of composition, not of memory."""
    return (7 * concept + 5 * background) % 17 == 0


def held_out_pairs() -> list[tuple[int, int]]:
    """All (concept, background) index pairs kept out of training, in order."""
    return [(c, b) for c in range(len(CONCEPTS)) for b in range(len(BACKGROUNDS)) if is_held_out(c, b)]
