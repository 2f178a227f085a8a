"""Training with the transformers Trainer: arguments from a profile, progress, checkpoints that are proven sound, resume, results.

`python -m helpers.training --profile tiny` runs what notebook 05 steps through, `accelerate launch -m helpers.training` the same on
several processes (notebook 08). On top of all other helpers.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import psutil
from datasets import Dataset
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from helpers import (
    command,
    data_report,
    evaluation,
    files,
    loading,
    plotting,
    processes,
    prompting,
    quantized_cache,
    records,
    results,
)
from helpers.checkpoints import (
    SafeTrainer,
    SoundCheckpoints,
    StopOnInterrupt,
    discard_unsound,
    newest_checkpoint,
    run_identity,
    step_of,
)
from helpers.divergence import StopOnDivergence
from helpers.errors import DataError, NotQuantizedError, NotShardedError
from helpers.outputs import output_folder, run_folder
from helpers.profiles import ROOT, Profile, check_settings


def training_arguments(profile: Profile, output: Path, seed: int) -> TrainingArguments:
    """The profile as TrainingArguments. Mixed precision follows the compute dtype: float16 brings its loss scaling with it."""
    return TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=profile.max_steps,
        per_device_train_batch_size=profile.micro_batch,
        gradient_accumulation_steps=profile.accumulation,
        learning_rate=profile.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=profile.warmup_steps,
        optim=profile.optimizer,
        bf16=profile.compute_dtype == "bfloat16" and profile.device == "cuda",
        fp16=profile.compute_dtype == "float16",
        use_cpu=profile.device == "cpu",
        train_sampling_strategy="sequential",  # the data set already lies in length-grouped order
        remove_unused_columns=False,
        dataloader_pin_memory=profile.device == "cuda",
        save_steps=profile.save_steps,
        save_total_limit=2,
        logging_steps=1,
        ddp_find_unused_parameters=False,  # every adapter is used in every pass
        include_num_input_tokens_seen="non_padding",  # summed over all processes: what shows that together they see every token once
        logging_nan_inf_filter=False,  # a loss that is not a number has to be seen
        report_to="none",
        disable_tqdm=True,  # Progress below draws the bar
        seed=seed,
    )


class Progress(TrainerCallback):
    """A bar in the terminal, a live curve in a notebook."""

    def __init__(self, total_steps: int):
        self.total, self.losses, self.bar, self.live = total_steps, [], None, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if not state.is_world_process_zero:
            return
        if plotting.in_notebook():
            self.live = plotting.LiveLoss(self.total)
        else:
            self.bar = tqdm(total=self.total, initial=state.global_step, desc="training", unit="step")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        self.losses.append(logs["loss"])
        if self.live:
            self.live.update(self.losses)
        elif self.bar:
            self.bar.update(state.global_step - self.bar.n)
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        if self.live:
            self.live.update(self.losses, force=True)
        elif self.bar:
            self.bar.close()


def build_trainer(model, tokenizer, encoded: Dataset, profile: Profile, output: Path, seed: int = 0) -> Trainer:
    """A Trainer over `encoded` in length-grouped order, with progress, sound checkpoints, a clean stop on interrupt, and DivergedError when
    the numbers go wrong. ProfileError for settings that cannot be, DataError for examples without a label or too few of them.
    """
    check_settings(profile)
    prompting.check_labels(encoded)
    arguments = training_arguments(processes.share(profile, processes.world().size), output, seed)
    batch = profile.micro_batch * profile.accumulation  # of one optimizer step, over all processes
    lengths = [len(ids) for ids in encoded["input_ids"]]
    order = prompting.length_grouped_order(lengths, batch, profile.max_steps, seed)
    trainer = SafeTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded.select(order),
        data_collator=prompting.Collator(tokenizer.eos_token_id),
        callbacks=[StopOnDivergence(), Progress(profile.max_steps), SoundCheckpoints(run_identity(profile, encoded, seed))],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(trainer: Trainer, resume: bool = False) -> dict:
    """Train, or go on from the newest sound checkpoint, and return losses and speed.

    Raises KeyboardInterrupt, with how to go on, after an interrupt has been turned into a checkpoint.
    """
    folder = Path(trainer.args.output_dir)
    identity = next(c.identity for c in trainer.callback_handler.callbacks if isinstance(c, SoundCheckpoints))
    checkpoint = newest_checkpoint(folder.parent, identity) if resume else None
    here = processes.world()
    if here.leads and checkpoint:
        discard_unsound(folder)
    elif here.leads and folder.exists():
        files.discard(folder)
    first = step_of(checkpoint) if checkpoint else 0
    if resume:
        here.say(f"resuming from {checkpoint.name}" if checkpoint else "no sound checkpoint found: starting at step 0")
    began = time.monotonic()
    with StopOnInterrupt() as stop:
        trainer.add_callback(stop)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:  # an error's sentence begins on a line of its own
            for bar in [c.bar for c in trainer.callback_handler.callbacks if isinstance(c, Progress) and c.bar]:
                bar.close()
        trainer.remove_callback(stop)
    seconds = time.monotonic() - began
    if stop.asked and trainer.state.global_step < trainer.args.max_steps:
        raise KeyboardInterrupt(
            f"stopped at step {trainer.state.global_step} of {trainer.args.max_steps}; its checkpoint is saved, run again with --resume (resume=True) to go on"
        )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seen = trainer.train_dataset["input_ids"][first * len(trainer.train_dataset) // trainer.args.max_steps :]
    return {
        "train_seconds": round(seconds, 2),
        "steps": trainer.state.global_step,
        "final_loss": round(sum(losses[-20:]) / len(losses[-20:]), 6),
        "useful_tokens_per_second": round(sum(map(len, seen)) / seconds, 1),
        "losses": losses,
    }


def run(
    profile: Profile,
    seed: int = 0,
    output: str | Path | None = None,
    data: str | None = None,
    columns: tuple[str, str] = ("prompt", "answer"),
    resume: bool = False,
    scoring: bool = True,
    cache: str | None = None,
) -> dict:
    """The whole of notebook 05: load, score the base, train, score again, save the adapter and results.json; returns the results.

    Without `data` the tickets are used, with their own test splits; else a tenth of `data` (at most 300 rows) is held out. `scoring` False
    leaves the scores out (None). `cache` is a folder for the quantized base, see `helpers.quantized_cache`. On several processes all train,
    each on its share of every batch; the first one alone prints, scores and writes, and the others return None. Raises LaunchError if their
    number does not divide the batch, NotShardedError under accelerate's FSDP.
    """
    began, here = psutil.Process().create_time(), processes.world()
    check_settings(profile)
    mine = processes.share(profile, here.size)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise NotShardedError(
            "helpers.training keeps the whole model in every process and was started with accelerate's FSDP: start helpers.sharding to spread one model over processes, or leave --use_fsdp out"
        )
    folder = output_folder(profile, output) if here.leads else run_folder(profile, output)
    if data is None:
        train_set, test, reworded = (records.read_tickets(split) for split in ("train", "test", "test_reworded"))
    else:
        (train_set, test), reworded = records.split_records(records.read_records(data, *columns)), None
    tokenizer = loading.load_tokenizer(profile)
    encoded, left_out = prompting.encode(train_set, tokenizer, profile.max_length)
    if data is not None and here.leads:
        print(data_report.inspect_data(train_set, test, tokenizer, profile.max_length))
    here.say(f"{len(encoded)} training examples, {left_out} left out as too long; {len(test)} test examples")

    if len(encoded) < profile.micro_batch * profile.accumulation:
        raise DataError(
            f"a step takes {profile.micro_batch * profile.accumulation} examples and there are {len(encoded)} to train on: add data"
        )
    batch = f"{mine.accumulation} x {mine.micro_batch}" if mine.accumulation > 1 else mine.micro_batch
    here.say(f"processes: {here.size}, each with {batch} of the {profile.micro_batch * profile.accumulation} examples of a step")
    device = here.device(profile)
    model = quantized_cache.load_base(profile, cache, device) if cache else loading.load_base(profile, device)
    proof = loading.prove_4bit(model)
    here.say(
        f"{profile.model} in 4-bit: {proof.linear4bit_modules} Linear4bit layers, {proof.footprint_bytes:,} bytes (predicted {proof.footprint_expected_bytes:,})"
    )

    def answer(split):
        return prompting.generate(model, tokenizer, split["prompt"], profile.max_new_tokens, profile.eval_batch)

    scores = dict.fromkeys(("before", "perplexity_before", "after", "after_reworded"))
    scoring = scoring and here.leads
    if scoring:
        perplexity = evaluation.perplexity(model, tokenizer, (ROOT / "data" / "heldout.txt").read_text(encoding="utf-8"))
        before = answer(test)
        scores |= {"before": evaluation.score(before, test["answer"]), "perplexity_before": round(perplexity, 4)}

    fingerprint = loading.base_fingerprint(model)
    model = loading.attach_lora(model, profile, seed)
    training = train(build_trainer(model, tokenizer, encoded, profile, folder, seed), resume)
    if loading.base_fingerprint(model) != fingerprint:
        raise NotQuantizedError(
            "the 4-bit base changed while the adapter was trained: report this with the versions in results.json"
        )
    if not here.leads:
        return None
    adapter = loading.save_adapter(model, folder / "adapter")

    if scoring:
        after = answer(test)
        if empty := sum(not text for text in after):
            here.say(
                f"{empty} of {len(after)} answers are empty: the model ends at once, look for short or empty answers in the data"
            )
        scores["after"] = evaluation.score(after, test["answer"])
        scores["after_reworded"] = evaluation.score(answer(reworded), reworded["answer"]) if reworded else None
    record = results.collect(profile, seed, model, proof, scores, training, time.time() - began, adapter)
    path = results.write(record, folder)
    if scoring:
        print(results.examples(test["prompt"], before, after, test["answer"]))
        print(results.table(record))
    print(
        f"trained {record['steps']} steps in {record['train_seconds']:.0f} s; adapter and {path.name} are in {record['adapter_dir'].removesuffix('/adapter')}"
    )
    return record


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status is that of `helpers.command`."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.training", description="Fine-tune a Falcon with QLoRA: score, train, score again, save."
    )
    command.add_run_options(parser)
    parser.add_argument("--data", type=command.named, help="JSONL, CSV or Parquet file, or hub data set, in place of the tickets")
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--answer-column", default="answer")
    parser.add_argument(
        "--cache-4bit", type=command.named, metavar="DIR", help="keep the quantized base in DIR and load it from there next time"
    )
    parser.add_argument("--no-scoring", action="store_true", help="train and save only, do not answer the test messages")
    args = parser.parse_args(arguments)
    columns = (args.prompt_column, args.answer_column)

    def work() -> None:
        with processes.loss_of_a_process_is_told():
            profile = command.chosen_profile(args)
            run(profile, args.seed, args.output, args.data, columns, args.resume, not args.no_scoring, args.cache_4bit)

    return command.status(work, "interrupted: run again with --resume to go on from the newest checkpoint, if one was saved")


if __name__ == "__main__":
    sys.exit(main())
