"""Ask an adapter from the terminal, or through a pipe: one message a line, one answer a line.

`python -m helpers.ask --adapter runs/tiny/adapter`, then type; or `... --batch 100 < messages.txt > answers.txt`.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from transformers import TextStreamer

from helpers import command, loading, profiles, prompting
from helpers.errors import DataError


def check_message(message: str, tokenizer, longest: int) -> None:
    """DataError for a message that holds the end token, or that leaves no room in the context of `longest` tokens."""
    if prompting.END in message:
        raise DataError(f"the message contains the end token {prompting.END!r}: remove it")
    tokens = len(tokenizer(prompting.build_prompt(message))["input_ids"])
    if tokens > longest:
        raise DataError(f"the message has {tokens:,} tokens with its template and the model reads {longest:,}: shorten it")


def answer_lines(
    lines: Iterable[str], answer: Callable[[list[str]], list[str]], check: Callable[[str], None], batch: int = 1
) -> Iterator[str]:
    """An answer to each line that is not blank, in their order, as soon as `batch` such lines are there. A line that `check` refuses with
    a DataError is told on stderr and answered by "".
    """
    messages = (line.strip() for line in lines)
    messages = (message for message in messages if message)
    while group := list(itertools.islice(messages, batch)):
        answers = dict.fromkeys(range(len(group)), "")
        usable = []
        for i, message in enumerate(group):
            try:
                check(message)
                usable.append(i)
            except DataError as error:
                print(f"DataError: {error}", file=sys.stderr)
        if usable:
            answers |= dict(zip(usable, answer([group[i] for i in usable]), strict=True))
        yield from answers.values()


def typed() -> Iterator[str]:
    """Lines typed at a prompt, until end of file."""
    while True:
        try:
            yield input("message (Ctrl-D ends)> ")
        except EOFError:
            return


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status is that of `helpers.command`."""
    parser = argparse.ArgumentParser(prog="python -m helpers.ask", description="Ask a trained adapter: a message a line.")
    parser.add_argument(
        "--adapter", type=command.named, required=True, help="folder that save_adapter wrote, for instance runs/tiny/adapter"
    )
    parser.add_argument("--profile", default="tiny", help=f"one of {', '.join(profiles.PROFILES)}; default tiny")
    parser.add_argument(
        "--batch",
        type=command.whole("batch size"),
        default=1,
        help="lines answered together when they come through a pipe; default 1",
    )
    args = parser.parse_args(arguments)

    def work() -> None:
        profile = profiles.resolve(args.profile)
        loading.check_adapter(args.adapter, profile, loading.load_config(profile))  # before the base is loaded
        tokenizer = loading.load_tokenizer(profile)
        model = loading.load_adapter(loading.load_base(profile), args.adapter, profile)
        longest = model.config.max_position_embeddings - profile.max_new_tokens
        check = partial(check_message, tokenizer=tokenizer, longest=longest)
        if sys.stdin.isatty():
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # prints while the answer is made
            answer = partial(prompting.generate_batch, model, tokenizer, max_new_tokens=profile.max_new_tokens, streamer=streamer)
            for _ in answer_lines(typed(), answer, check):
                pass
        else:
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
            answer = partial(
                prompting.generate, model, tokenizer,
                max_new_tokens=profile.max_new_tokens, batch_size=profile.eval_batch, progress=False,
            )  # fmt: skip
            for line in answer_lines(sys.stdin, answer, check, args.batch):
                print(" ".join(line.split()), flush=True)

    return command.status(work, "interrupted: what was answered stands above")


if __name__ == "__main__":
    sys.exit(main())
