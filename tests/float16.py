"""Training as on a T4, on a CPU: the loop that transformers' Trainer runs there (autocast to float16, GradScaler, clipping), written out,
since accelerate refuses float16 on a CPU. `python -m tests.float16` is the soak: five seeds, float16 and bfloat16 and float32, scored.
"""

import argparse
import contextlib
import dataclasses
import math
import statistics

import torch
from transformers import get_cosine_schedule_with_warmup

from helpers import command, evaluation, loading, profiles, prompting, records


def train(dtype: str, seed: int, steps: int, encoded, tokenizer) -> tuple[torch.nn.Module, list[float], int]:
    """(model, loss of each step, steps that the scaler skipped) of a QLoRA run of the tiny Falcon that computes in `dtype`."""
    profile = dataclasses.replace(profiles.PROFILES["tiny"], compute_dtype=dtype, max_steps=steps)
    model = loading.attach_lora(loading.load_base(profile), profile, seed).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=profile.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(profile.warmup_steps, steps // 3), steps)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == "float16")
    order = prompting.length_grouped_order([len(ids) for ids in encoded["input_ids"]], profile.micro_batch, steps, seed)
    collate, losses, skipped = prompting.Collator(tokenizer.eos_token_id), [], 0
    for start in range(0, len(order), profile.micro_batch):
        batch = collate([encoded[i] for i in order[start : start + profile.micro_batch]])
        half = contextlib.nullcontext() if dtype == "float32" else torch.autocast("cpu", dtype=profile.dtype)
        with half:
            loss = model(**batch).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return model, losses, skipped
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
        schedule.step()
        optimizer.zero_grad()
    return model, losses, skipped


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.float16")
    parser.add_argument("--seeds", type=command.whole("number of seeds", most=100), default=5)
    parser.add_argument("--steps", type=command.steps, default=600)
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    args = parser.parse_args(arguments)
    tiny = profiles.PROFILES["tiny"]
    tokenizer = loading.load_tokenizer(tiny)
    encoded, _ = prompting.encode(records.read_tickets("train"), tokenizer, tiny.max_length)
    test = records.read_tickets("test")
    for dtype in args.dtypes:
        scores = []
        for seed in range(args.seeds):
            model, losses, skipped = train(dtype, seed, args.steps, encoded, tokenizer)
            finite = all(map(math.isfinite, losses))
            answers = prompting.generate(model, tokenizer, test["prompt"], tiny.max_new_tokens, tiny.eval_batch, progress=False)
            scores.append(evaluation.score(answers, test["answer"])["exact_match"])
            print(
                f"{dtype:<9} seed {seed}: losses finite {finite}, last {losses[-1]:.4f}, skipped {skipped}, exact match {scores[-1]:.3f}",
                flush=True,
            )
        print(
            f"{dtype:<9} exact match {statistics.mean(scores):.3f}, from {min(scores):.3f} to {max(scores):.3f} over {args.seeds} seeds",
            flush=True,
        )


if __name__ == "__main__":
    main()
