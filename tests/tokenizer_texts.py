"""Texts to try tokenizers on."""

import random
import string
from collections.abc import Callable

from biomedlm_jax.tokenizer import EOS

WHITESPACE = (
    " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\u00a0\u1680\u2000\u2003\u2028\u2029\u202f\u205f\u3000\u200b\u180e\ufeff\u2581"
)

# What tokenizers stumble over: spaces in runs, reserved characters and names, characters of every width, joiners.
TRICKY = [
    "\u2581",
    "\u2585",
    "\ufffd",
    "\0",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\x85",
    "\u2028",
    "\ufeff",
    "\u200b",
    "\u0301",
    "\u00a0",
    EOS,
    "<unk>",
    "<0x41>",
    "<s>",
    "</s>",
    "<unused 0>",
    "[PAD]",
    "Ġ",
    "Ċ",
    "the",
    " the",
    "it's",
    "1234",
    "é",
    "α",
    "日",
    "\U0001f642",
    "\U0010ffff",
    "#",
    "# #",
]


def corpus() -> list[str]:
    """Pseudo-biomedical text in which characters, words and phrases repeat."""
    rng = random.Random(0)
    stems = ["immuno", "histo", "chemistry", "chromato", "graphy", "cyto", "toxicity", "photo", "synthesis", "biotic"]
    words = ["".join(rng.sample(stems, rng.randint(1, 3))) for _ in range(300)] + ["the", "of", "(n = 12)", "p<0.05"]
    return [f"Title {index}\n" + " ".join(rng.choices(words, k=40)).capitalize() + "." for index in range(300)]


def fuzzed_texts(count: int, seed: int) -> list[str]:
    """Random strings without surrogates, of every kind that a tokenizer may take for something else."""
    rng, book = random.Random(seed), "\n".join(corpus())

    def damaged() -> str:
        start = rng.randrange(len(book))
        text = list(book[start : start + rng.randrange(1, 150)])
        text[rng.randrange(len(text))] = rng.choice(TRICKY)
        return "".join(text)

    def character() -> str:
        return chr(
            rng.choice(
                [rng.randrange(0x250), rng.randrange(0x3000), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]
            )
        )

    def of_any_plane() -> str:
        plane = rng.randrange(17) << 16
        points = [plane + rng.randrange(0x10000) for _ in range(rng.randrange(20))]
        return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)

    def of(characters: str, length: int) -> Callable[[], str]:
        return lambda: "".join(rng.choices(characters, k=rng.randrange(length)))

    makers = [
        lambda: "".join(rng.choice(TRICKY) for _ in range(rng.randrange(20))),
        damaged,
        lambda: "".join(character() for _ in range(rng.randrange(30))),
        of_any_plane,
        of("immunochsty  \n", 60),
        of(string.printable, 60),
        of("".join(map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x61])), 20),
        of(WHITESPACE + "a", 20),
        of("aeé\u0300\u0301\u0316\u0327\u0345\u20dd\u034f", 20),
        of("\U0001f468\U0001f469\U0001f466\U0001f3fd\u200d\ufe0f\u2764\U0001f1e9\U0001f1ea ", 20),
        # Words beyond any cache, and texts beyond the parts that SentencePiece is given.
        lambda: rng.choice(["ACGT", "a b", "x\n", " "]) * rng.randrange(1, 40) + damaged(),
        lambda: (damaged() + " ") * rng.choice([1, 1, 1, 1, 1, 1, 1, 1, 1, 40]),
    ]
    return [rng.choice(makers)() for _ in range(count)]


def without_surrogates(text: str) -> str:
    return "".join("\ufffd" if 0xD800 <= ord(character) < 0xE000 else character for character in text)
