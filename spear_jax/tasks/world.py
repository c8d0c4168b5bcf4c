"""The market behind the embedded tasks: invented traders, their wares, and the wares' kinds.

Everything is drawn from fixed seeds, so that pretraining, training and evaluation agree without any
file. The embedded model is pretrained to know the *old* traders and the kinds of all wares. It
never sees what a *new* trader sells.
"""

import random

KINDS: dict[str, tuple[str, ...]] = {
    "metal": ("copper", "iron", "silver", "tin", "zinc", "brass"),
    "fruit": ("apples", "plums", "pears", "figs", "lemons", "cherries"),
    "bird": ("robins", "crows", "owls", "herons", "wrens", "storks"),
    "tree": ("oaks", "birches", "cedars", "maples", "willows", "pines"),
    "tool": ("hammers", "saws", "drills", "chisels", "wrenches", "files"),
    "cloth": ("silk", "wool", "linen", "cotton", "velvet", "denim"),
    "fish": ("trout", "salmon", "cod", "carp", "eels", "perch"),
    "spice": ("pepper", "cumin", "ginger", "saffron", "cloves", "mint"),
}
KIND_OF = {ware: kind for kind, wares in KINDS.items() for ware in wares}
WARES = tuple(KIND_OF)

PHRASINGS = (
    "What does {name} sell?",
    "Which ware does {name} offer?",
    "What can you buy from {name}?",
    "{name} keeps a stall. What is on it?",
    "You visit {name} at the market. What do you find there?",
    "Name the ware of {name}.",
    "What is it that {name} trades in?",
    "A friend bought something from {name}. What was it?",
    "{name} came to the market with a full cart. What was in it?",
    "What do people get when they go to {name}?",
    "Which of these belongs to the trade of {name}?",
    "What has {name} brought to sell today?",
)
TRAIN_PHRASINGS, TEST_PHRASINGS = PHRASINGS[:9], PHRASINGS[9:]

_SYLLABLES = """bel bra cor dra dun fen gar hol jin kas kel lor lum mar mir nor ost pan pel quo
ral rin sel shu tam tor ul vel vor wen yar zel""".split()


def _names(count: int) -> tuple[str, ...]:
    rng = random.Random(20260)
    pairs = [a + b for a in _SYLLABLES for b in _SYLLABLES if a != b]
    return tuple(name.capitalize() for name in rng.sample(pairs, count))


NUM_OLD, NUM_NEW = 112, 48
_NAMES = _names(NUM_OLD + NUM_NEW)
OLD_TRADERS, NEW_TRADERS = _NAMES[:NUM_OLD], _NAMES[NUM_OLD:]


def _wares() -> dict[str, str]:
    rng = random.Random(4711)
    wares: list[str] = []
    while len(wares) < len(_NAMES):
        wares += rng.sample(WARES, len(WARES))  # every ware equally often
    return dict(zip(_NAMES, wares, strict=False))


WARE_OF = _wares()


def draw_options(ware: str, rng: random.Random) -> tuple[tuple[str, ...], int]:
    """Draws four wares of four kinds in random order, and the index of `ware` among them.

    The gold ware comes first here:

        >>> draw_options("tin", random.Random(0))
        (('tin', 'drills', 'pepper', 'eels'), 0)
    """
    others = rng.sample([kind for kind in KINDS if kind != KIND_OF[ware]], 3)
    options = [ware, *(rng.choice(KINDS[kind]) for kind in others)]
    rng.shuffle(options)
    return tuple(options), options.index(ware)
