"""Write data/tickets: customer messages with the JSON ticket and the short reply that belong to each. Seeded, standard library only.

python data/build_tickets.py            rewrites the four splits; the same seed gives the same bytes
"""

import argparse
import json
import random
import zlib
from pathlib import Path

from grammar import (
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

FOLDER = Path(__file__).resolve().parent / "tickets"
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
    return [f"{o} {k}" for o in WISH_OPENERS for k in wishes] + [f"{o} {k}" for o in ("", *FACT_OPENERS) for k in facts]


def split_of(request: str) -> str:
    """The split a request belongs to, by a stable hash: 80% train, 8% validation, 12% test. So no two splits share a request."""
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
    """One message: greeting, request with order id, urgency and small talk in varying order, closing."""
    mark = "?" if request.startswith(QUESTIONS) else "."
    body = [rng.choice(FRAMES).format(r=request.format(p=product).strip(), m=mark, o=order)]
    for part in (urgency, rng.choice(SMALL_TALK)):
        if part:
            body.insert(rng.randrange(len(body) + 1), part)
    text = sentence_case(" ".join(body))
    return " ".join(part for part in (rng.choice(GREETINGS), text, rng.choice(CLOSINGS)) if part)


def misspell(rng: random.Random, message: str, protected: tuple[str, ...]) -> str:
    """Swap, drop or double one letter in one word of at least five letters which is not part of a `protected` string."""
    keep = {word for text in protected for word in text.split()}
    words = message.split(" ")
    places = [i for i, word in enumerate(words) if len(word) >= 5 and word.isalpha() and word not in keep]
    if places:
        at = rng.choice(places)
        word, i = words[at], rng.randrange(1, len(words[at]) - 2)
        words[at] = rng.choice(
            (word[:i] + word[i + 1] + word[i] + word[i + 2 :], word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:])
        )
    return " ".join(words)


def make_row(rng: random.Random, intent: str, split: str) -> dict[str, str]:
    """One row: `message`, `ticket` (one line of JSON) and `reply`."""
    reworded = split == "test_reworded"
    pool = requests(intent, HELD_OUT_KEY_PHRASES if reworded else KEY_PHRASES)
    request = rng.choice(pool if reworded else [r for r in pool if split_of(r) == split])
    product, order, level = rng.choice(PRODUCTS), order_id(rng), rng.choice(("high", "normal", "low"))
    phrase = rng.choice((HELD_OUT_URGENCY if reworded else URGENCY)[level])
    message = compose(rng, request, product, order, phrase)
    if reworded and rng.random() < 0.5:
        message = misspell(rng, message, (product, order))
    ticket = json.dumps({"intent": intent, "product": product, "order": order, "urgency": level}, separators=(",", ":"))
    reply = f"Thank you for writing. We will {REMEDY[intent].format(p=product)} from order {order} {DEADLINE[level]}."
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
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # --help, and no option: anything else is refused
    for split, size in SIZES.items():
        path = FOLDER / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in build(split, size)), encoding="utf-8")
        print(f"{path.name}: {size} rows")
