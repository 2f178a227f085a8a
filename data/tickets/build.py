"""Write data/tickets: customer messages with the JSON ticket and the short reply of each.

`python data/tickets/build.py` rewrites the four splits; the same seed gives the same bytes.
"""

import argparse
import json
import random
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.tickets.grammar import (
    CLOSINGS,
    FACT_OPENERS,
    FRAMES,
    GREETINGS,
    HELD_OUT_KEY_PHRASES,
    HELD_OUT_URGENCY,
    KEY_PHRASES,
    PRODUCTS,
    SMALL_TALK,
    URGENCY,
    WISH_OPENERS,
)

FOLDER = Path(__file__).resolve().parent
SIZES = {"train": 2400, "validation": 200, "test": 300, "test_reworded": 300}
QUESTIONS = ("Can ", "Could ", "May ", "Is ", "How ")
ORDER_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # no I and no O, which look like digits

REMEDY = {
    "refund": "refund the {p}",
    "exchange": "exchange the {p}",
    "cancel": "cancel the {p}",
    "delivery": "look for the {p}",
    "damage": "replace the {p}",
    "missing": "send the missing part of the {p}",
    "invoice": "send the invoice for the {p}",
    "address": "change the address for the {p}",
}
DEADLINE = {"high": "today", "normal": "this week", "low": "this month"}


def requests(intent: str, key_phrases: dict) -> list[str]:
    """All requests of an intent: every opener with every key phrase that it can introduce."""
    wishes, facts = key_phrases[intent]
    found = [f"{opener} {key}" for opener in WISH_OPENERS for key in wishes]
    return found + [f"{opener} {key}" for opener in ("", *FACT_OPENERS) for key in facts]


def split_of(request: str) -> str:
    """The one split that has a request, by a hash: 80% train, 8% validation, 12% test."""
    bucket = zlib.crc32(request.encode()) % 100
    return "train" if bucket < 80 else "validation" if bucket < 88 else "test"


def order_id(rng: random.Random) -> str:
    return rng.choice(ORDER_LETTERS) + "".join(rng.choice("0123456789") for _ in range(4))


def sentence_case(text: str) -> str:
    """Upper-case the first letter, and each letter that begins a sentence."""
    out, start = [], True
    for char in text:
        out.append(char.upper() if start and char.isalpha() else char)
        start = char in ".!?" or (start and not char.isalnum())
    return "".join(out)


def compose(rng: random.Random, request: str, product: str, order: str, urgency: str) -> str:
    """One message: greeting, request with order id, urgency and small talk in varying order,
    closing.
    """
    mark = "?" if request.startswith(QUESTIONS) else "."
    body = [rng.choice(FRAMES).format(r=request.format(p=product).strip(), m=mark, o=order)]
    for part in (urgency, rng.choice(SMALL_TALK)):
        if part:
            body.insert(rng.randrange(len(body) + 1), part)
    text = sentence_case(" ".join(body))
    return " ".join(part for part in (rng.choice(GREETINGS), text, rng.choice(CLOSINGS)) if part)


def misspell(rng: random.Random, message: str, protected: tuple[str, ...]) -> str:
    """Swap, drop or double a letter of one word of five letters or more, none of `protected`."""
    keep = {word for text in protected for word in text.split()}
    words = message.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= 5 and word.isalpha()]
    places = [i for i in long if words[i] not in keep]
    if places:
        at = rng.choice(places)
        word, i = words[at], rng.randrange(1, len(words[at]) - 2)
        swapped = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        words[at] = rng.choice((swapped, word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:]))
    return " ".join(words)


def make_row(rng: random.Random, intent: str, split: str) -> dict[str, str]:
    """One row: `message`, `ticket` (one line of JSON) and `reply`."""
    reworded = split == "test_reworded"
    pool = requests(intent, HELD_OUT_KEY_PHRASES if reworded else KEY_PHRASES)
    request = rng.choice(pool if reworded else [r for r in pool if split_of(r) == split])
    product, order = rng.choice(PRODUCTS), order_id(rng)
    level = rng.choice(("high", "normal", "low"))
    phrase = rng.choice((HELD_OUT_URGENCY if reworded else URGENCY)[level])
    message = compose(rng, request, product, order, phrase)
    if reworded and rng.random() < 0.5:
        message = misspell(rng, message, (product, order))
    fields = {"intent": intent, "product": product, "order": order, "urgency": level}
    ticket, remedy = json.dumps(fields, separators=(",", ":")), REMEDY[intent].format(p=product)
    reply = f"Thank you for writing. We will {remedy} from order {order} {DEADLINE[level]}."
    return {"message": message, "ticket": ticket, "reply": reply}


def build(split: str, size: int) -> list[dict[str, str]]:
    """`size` distinct rows of a split, its intents in equal numbers, shuffled."""
    rng = random.Random(f"tickets-{split}")
    rows, seen = [], set()
    intents = list(KEY_PHRASES)
    while len(rows) < size:
        row = make_row(rng, intents[len(rows) % len(intents)], split)
        if row["message"] not in seen:
            seen.add(row["message"])
            rows.append(row)
    rng.shuffle(rows)
    return rows


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # knows --help only
    for split, size in SIZES.items():
        path = FOLDER / f"{split}.jsonl"
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in build(split, size)), encoding="utf-8"
        )
        print(f"{path.name}: {size} rows")
