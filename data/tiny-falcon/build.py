"""Pretrain data/tiny-falcon, the model every notebook runs on when no GPU is there.

`python data/tiny-falcon/build.py`, or `make pretrain`; about 25 minutes on two cores.

Steps: fetch the books (npm), train a byte-level BPE tokenizer, pretrain a `FalconForCausalLM` of
Falcon-7b's structure, write weights (bfloat16 safetensors), tokenizer, config, learning curve,
held-out text. Seeded; the batch of a step depends only on the seed and the step, so a run that was
stopped goes on from its last checkpoint as if nothing had happened.
"""

import argparse
import copy
import itertools
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from corpus import ABOUT, EOS, NOTED, TOPICS, Corpus, load_books
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast

from helpers import environment, plotting, prompting, records

HERE = Path(__file__).resolve().parent
LENGTH, BATCH, PEAK_LR, WARMUP = 128, 32, 3e-3, 100
# Shares of the rows by kind. The first steps train nothing but copying: then the ability comes
# suddenly, between steps 300 and 400. In a mixture from the start it had not come after 1,400.
COPYING_STEPS = 400
MIXTURE = {
    "text": 0.26,
    "dialogue": 0.36,
    "short": 0.20,
    "record": 0.05,
    "codes": 0.03,
    "copy": 0.10,
}
CONFIG = dict(
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=2,
    multi_query=True,
    parallel_attn=True,
    alibi=False,
    bias=False,
    new_decoder_architecture=False,
    bos_token_id=0,
    eos_token_id=0,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that normalizes nothing, as Falcon's; each digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    text = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, text])
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random("tokenizer")
    sample = [
        getattr(corpus, kind)(rng)
        for kind, count in (("text", 1500), ("dialogue", 3000), ("record", 600))
        for _ in range(count)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def make_row(kind: str, rng: random.Random, corpus: Corpus, tokenizer) -> list[int]:
    """LENGTH token ids of one kind: documents, each closed by the end token, the last cut off."""
    end = tokenizer.eos_token_id
    ids: list[int] = []
    while len(ids) < LENGTH:
        if kind != "copy":
            ids += [*tokenizer(getattr(corpus, kind)(rng))["input_ids"], end]
            continue
        part = [rng.randrange(1, len(tokenizer)) for _ in range(rng.randrange(4, 40))]
        if rng.random() < 0.5:  # again and again to the end of the row, or twice, each time closed
            ids += part * (LENGTH // len(part) + 1)
        else:
            ids += [*part, end, *part, end]
    return ids[:LENGTH]


def make_batch(step: int, seed: int, corpus: Corpus, tokenizer) -> torch.Tensor:
    """BATCH rows, which depend on seed and step alone: a resumed run sees the same ones."""
    rng = random.Random(f"{seed}-{step}")
    kinds = ["copy"] * BATCH
    if step >= COPYING_STEPS:
        kinds = rng.choices(list(MIXTURE), list(MIXTURE.values()), k=BATCH)
    return torch.tensor([make_row(kind, rng, corpus, tokenizer) for kind in kinds])


@torch.no_grad()
def measure(model, corpus: Corpus, tokenizer, held_out: torch.Tensor) -> dict[str, float]:
    """Held-out loss, and the share of a random string that is copied right when it is repeated."""
    model.eval()
    loss = model(held_out, labels=held_out).loss.item()
    rng, n = random.Random("copying"), 20
    parts = torch.tensor([[rng.randrange(1, len(tokenizer)) for _ in range(n)] for _ in range(64)])
    end = torch.full((64, 1), tokenizer.eos_token_id)
    ids = torch.cat([parts, end, parts], dim=1)
    # the first copied token is a guess, the others follow from the string
    guess = model(ids).logits[:, n + 1 : -1].argmax(-1)
    model.train()
    scores = {
        "held_out_loss": round(loss, 4),
        "copying": round((guess == parts[:, 1:]).float().mean().item(), 4),
    }
    return scores | {kind: round(share, 4) for kind, share in reading(model, tokenizer).items()}


def reading(model, tokenizer, messages: int = 100) -> dict[str, float]:
    """The share of validation messages whose topic and whose urgency the agent restates rightly."""
    rows = records.read_tickets("validation").select(range(messages))
    tokenizer = copy.deepcopy(tokenizer)  # the one that is saved has no padding token
    tokenizer.pad_token = tokenizer.eos_token
    answers = prompting.generate(model, tokenizer, rows["prompt"], 80, messages, progress=False)
    tickets = [json.loads(answer) for answer in rows["answer"]]
    topic = urgency = 0
    for answer, ticket in zip(answers, tickets, strict=True):
        intent = ticket["intent"]
        topic += any(frame.format(topic=TOPICS[intent], intent=intent) in answer for frame in ABOUT)
        urgency += any(note in answer for note in NOTED[ticket["urgency"]])
    return {"topic": topic / messages, "urgency": urgency / messages}


def write_card(record: dict, folder: Path, vocab: int) -> None:
    """The folder's README.md and learning_curve.png, from the record of the run."""
    import matplotlib.pyplot as plt

    plotting.set_style()
    curve = record["curve"]
    steps = [point["step"] for point in curve]
    figure, axes = plt.subplots()
    axes.plot(steps, [point["held_out_loss"] for point in curve], color=plotting.GREY)
    axes.set(xlabel="step", ylabel="held-out loss (nats a token)")
    axes.set_title("Copying comes suddenly, reading follows")
    axes.yaxis.label.set_color("dimgrey")
    other = axes.twinx()
    colors = {"copying": plotting.ORANGE, "topic": plotting.BLUE, "urgency": plotting.GREEN}
    for key, color in colors.items():
        other.plot(steps, [point[key] for point in curve], color=color, label=key)
    other.set(ylabel="share right", ylim=(0, 1.02))
    other.legend(loc="center right")
    other.grid(visible=False)
    figure.savefig(folder / "learning_curve.png")
    row = "| {step:,} | {held_out_loss:.2f} | {copying:.3f} | {topic:.2f} | {urgency:.2f} |"
    rows = "\n".join(row.format(**point) for point in curve[3::4] or curve)
    mixture = ", ".join(f"{share:.0%} {kind}" for kind, share in record["mixture"].items())
    facts = {key: record[key] for key in ("parameters", "seed", "steps", "tokens", "copying_steps")}
    size = (HERE / "heldout.txt").stat().st_size
    ends = [0, *(point["seconds"] for point in curve)]  # the median: a machine may be interrupted
    pace = statistics.median(end - begin for begin, end in itertools.pairwise(ends))
    minutes = round(pace * len(curve) / 60)
    facts |= {"batch": BATCH, "length": LENGTH, "minutes": minutes, "rows": rows}
    facts |= {"mixture": mixture, "heldout_bytes": size, "vocab": vocab}
    text = (HERE / "card.md").read_text(encoding="utf-8").format(**facts)
    (folder / "README.md").write_text(text, encoding="utf-8")


def pretrain(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    books, held_out_books = load_books(Path(args.cache))
    (HERE / "heldout.txt").write_text("\n\n".join(held_out_books) + "\n", encoding="utf-8")
    corpus = Corpus(books)
    tokenizer = train_tokenizer(corpus, args.vocab)
    model = FalconForCausalLM(FalconConfig(vocab_size=len(tokenizer), **CONFIG))
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.95),
        fused=True,
    )

    def rate(step: int) -> float:
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        return min(1, (step + 1) / WARMUP) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    ids = tokenizer("\n\n".join(held_out_books))["input_ids"]
    held_out = torch.tensor(ids[: 64 * LENGTH]).view(64, LENGTH)

    checkpoint = Path(args.cache) / f"checkpoint-{args.seed}-{args.steps}-{args.vocab}.pt"
    curve, first = [], 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        curve, first = state["curve"], state["step"]
        print(f"going on from step {first}")
    seconds, began = curve[-1]["seconds"] if curve else 0.0, time.monotonic()
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=5)
    for step in bar:
        batch = make_batch(step, args.seed, corpus, tokenizer)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            point = {"step": step + 1, "seconds": round(seconds + time.monotonic() - began)}
            point |= {"loss": round(loss.item(), 4)}
            curve.append(point | measure(model, corpus, tokenizer, held_out))
            bar.set_postfix({k: v for k, v in curve[-1].items() if k not in ("step", "seconds")})
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"curve": curve, "step": step + 1}
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
    """The command line; exit status as `environment.exit_status`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    number = environment.whole_number
    parser.add_argument("--steps", type=number(), default=8000)
    parser.add_argument("--seed", type=number(0, 2**32 - 1), default=0)
    parser.add_argument("--vocab", type=number(512, 65_536), default=1024, help="tokens")
    parser.add_argument("--every", type=number(), default=200, help="steps between checkpoints")
    parser.add_argument(
        "--cache",
        default=str(Path.home() / ".cache" / "tiny-falcon"),
        help="folder of the downloaded books and of the checkpoint",
    )
    parser.add_argument("--output", default=str(HERE))
    args = parser.parse_args(arguments)
    return environment.exit_status(
        lambda: pretrain(args),
        "interrupted: run the same command to go on from the last checkpoint",
    )


if __name__ == "__main__":
    sys.exit(main())
