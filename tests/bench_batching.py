"""Useful (non-padding) tokens a second: length-grouped batches padded to their longest against the usual padding of every example to
the maximum length. Same model, data, examples a step and trainer; three runs of each in turn, ratio of medians. `make bench`
"""

import contextlib
import io
import statistics
import tempfile
from pathlib import Path

from helpers import loading, profiles, prompting, records, training

STEPS, RUNS = 40, 3


class PadToMaximum(prompting.Collator):
    """What tokenizers do with padding="max_length": every example as long as the longest that is allowed."""

    def __init__(self, pad_id: int, max_length: int):
        super().__init__(pad_id)
        self.filler = {"input_ids": [pad_id] * max_length, "labels": [prompting.IGNORED] * max_length}

    def __call__(self, examples):
        return {key: value[:-1] for key, value in super().__call__([*examples, self.filler]).items()}


def speed(profile, encoded, tokenizer, collator, order) -> float:
    """Useful tokens a second of one run of STEPS steps; the first five, which warm up caches, are part of every run alike."""
    model = loading.attach_lora(loading.load_base(profile), profile)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        trainer = training.build_trainer(model, tokenizer, encoded, profile, Path(folder))
        trainer.train_dataset, trainer.data_collator = encoded.select(order), collator
        return training.train(trainer)["useful_tokens_per_second"]


def main() -> None:
    from dataclasses import replace

    profile = replace(profiles.PROFILES["tiny"], max_steps=STEPS, save_steps=STEPS)
    tokenizer = loading.load_tokenizer(profile)
    encoded, _ = prompting.encode(records.read_tickets("train"), tokenizer, profile.max_length)
    count = STEPS * profile.micro_batch
    grouped = prompting.length_grouped_order([len(ids) for ids in encoded["input_ids"]], profile.micro_batch, STEPS, seed=0)
    recipes = {
        "length-grouped": (prompting.Collator(tokenizer.eos_token_id), grouped),
        "pad to maximum": (PadToMaximum(tokenizer.eos_token_id, profile.max_length), list(range(count))),
    }
    speeds = {name: [] for name in recipes}
    for _ in range(RUNS):
        for name, (collator, order) in recipes.items():
            speeds[name].append(speed(profile, encoded, tokenizer, collator, order))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, values in speeds.items():
        print(f"{name:<16} {medians[name]:>8,.0f} useful tokens/s   (runs: {', '.join(f'{v:,.0f}' for v in values)})")
    print(
        f"ratio of medians {medians['length-grouped'] / medians['pad to maximum']:.2f}   (maximum length {profile.max_length} tokens)"
    )


if __name__ == "__main__":
    main()
