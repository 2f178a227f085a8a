"""The command line's whole run: load, prove, score, fine-tune, score again, save.

`python -m helpers.training --profile tiny` does what notebook 05 writes out, with the same numbers;
`accelerate launch -m helpers.training` the same on several processes (notebook 08)."""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pandas as pd
import psutil
import torch
from accelerate import PartialState
from bitsandbytes.optim import GlobalOptimManager
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

from helpers import checkpoints, environment, evaluation, loading, profiles, prompting, records
from helpers.environment import ROOT, whole_number
from helpers.errors import DataError, NotQuantizedError, TutorialError
from helpers.profiles import Profile


def share(profile: Profile, size: int) -> Profile:
    """The profile of one of `size` processes, so that together they take the same examples a step.
    Accumulation is shared first, at no cost, then the micro-batch; TutorialError if uneven."""
    shared = math.gcd(profile.accumulation, size)
    micro_batch, rest = divmod(profile.micro_batch, size // shared)
    if rest:
        batch = profile.micro_batch * profile.accumulation
        even = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        wrong = f"{size} processes cannot share the {batch} examples of a step of profile"
        raise TutorialError(f"{wrong} {profile.name!r} evenly: start one of {even} processes")
    return replace(profile, accumulation=profile.accumulation // shared, micro_batch=micro_batch)


def training_arguments(profile: Profile, folder: Path, seed: int, validation: bool = False):
    """The profile as TrainingArguments, see notebook 05; `folder` takes the checkpoints."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=profile.max_steps,
        per_device_train_batch_size=profile.micro_batch,
        gradient_accumulation_steps=profile.accumulation,
        per_device_eval_batch_size=profile.micro_batch,
        learning_rate=profile.learning_rate,
        weight_decay=profile.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=min(profile.warmup_steps, profile.max_steps // 4),
        optim=profile.optimizer,
        bf16=profile.compute_dtype == "bfloat16" and profile.device == "cuda",
        fp16=profile.compute_dtype == "float16",  # brings its loss scaling with it
        use_cpu=profile.device == "cpu",
        train_sampling_strategy="sequential",  # the rows already lie in length-grouped order
        dataloader_pin_memory=profile.device == "cuda",
        eval_strategy="steps" if validation else "no",
        eval_steps=max(1, profile.max_steps // 4),
        save_steps=profile.save_steps,
        save_total_limit=2,
        logging_steps=1,
        ddp_find_unused_parameters=False,  # every adapter is used in every pass
        include_num_input_tokens_seen="non_padding",
        logging_nan_inf_filter=False,  # a loss that is not a number has to be seen
        report_to="none",
        disable_tqdm=True,  # `checkpoints.Progress` shows the minutes that are left
        seed=seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # with two cards Trainer doubles the batch
    return arguments


def fine_tune(
    model,
    tokenizer,
    train: Dataset,
    profile: Profile,
    output: str | Path,
    seed: int = 0,
    resume: bool = False,
    validation: Dataset | None = None,
) -> dict:
    """Train the adapters of `model` on encoded rows; returns `losses` (nats a token, one a step),
    `final_loss` (mean of 20), `validation_losses`, `steps` and two figures of speed.

    Checkpoints go to output/checkpoints; `resume` goes on from the newest sound one and ends with
    the bits of an undisturbed run, if it has as many steps. KeyboardInterrupt, after a checkpoint
    was saved, says how to go on; TutorialError for a loss that is not finite, another run's
    checkpoint, or a full disk."""
    state = PartialState(cpu=profile.device == "cpu")
    mine, leads = share(profile, state.num_processes), state.is_main_process
    batch = profile.micro_batch * profile.accumulation  # of one step, over all processes
    lengths = [len(ids) for ids in train["input_ids"]]
    order = prompting.length_grouped_order(lengths, batch, profile.max_steps, seed)
    folder, identity = Path(output) / "checkpoints", checkpoints.run_identity(profile, train, seed)
    with checkpoints.only_run_in(Path(output)) if leads else contextlib.nullcontext():
        steps = profile.max_steps
        newest = checkpoints.newest_checkpoint(folder, identity, steps, leads) if resume else None
        if newest:
            left = steps - checkpoints.step_of(newest)
            state.print(f"resuming from {newest.name}, {left} steps are left")
            planned = json.loads((newest / "trainer_state.json").read_text())["max_steps"]
            if planned != steps:
                state.print(f"its learning rate was to reach 0 at step {planned}: now it jumps")
        elif resume or checkpoints.found_in(folder) or Path(output, "adapter").exists():
            gone = "former checkpoints go, then the adapter (--output keeps them apart)"
            state.print(f"{'no sound checkpoint' if resume else gone}: starting anew")
        if leads and not newest:
            checkpoints.remove_all(folder)
        state.wait_for_everyone()
        stop, progress = checkpoints.StopOnInterrupt(), checkpoints.Progress()
        divergence, marker = checkpoints.StopOnDivergence(), checkpoints.Checkpoints(identity)
        trainer = Trainer(
            model=model,
            args=training_arguments(mine, folder, seed, validation is not None),
            train_dataset=train.select(order),
            eval_dataset=validation and validation.select(range(min(64, len(validation)))),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[divergence, progress, marker, stop],
        )
        trainer.remove_callback(PrinterCallback)
        began = time.monotonic()
        try:
            with environment.writing(folder, "make room on that disk, then go on with --resume"):
                trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        finally:
            progress.close()
            stop.release()
            # bitsandbytes's 8-bit optimizers keep every embedding they were told of: 1.2 GB of a 7B
            GlobalOptimManager.get_instance().initialize()
    seconds = time.monotonic() - began
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    trained = order[checkpoints.step_of(newest) * batch :] if newest else order
    return {
        "train_seconds": round(seconds, 2),
        "steps": trainer.state.global_step,
        "final_loss": round(fmean(losses[-20:]), 6),
        "validation_losses": [round(e["eval_loss"], 6) for e in history if "eval_loss" in e],
        "useful_tokens_per_second": round(sum(lengths[i] for i in trained) / seconds, 1),
        "losses": losses,
    }


def refuse_to_lose(folder: Path) -> None:
    """TutorialError if the newest sound checkpoint in `folder` is of an unfinished run."""
    for newest in [*filter(checkpoints.is_sound, checkpoints.found_in(folder))][-1:]:
        steps = json.loads((newest / "trainer_state.json").read_text())["max_steps"]
        if checkpoints.step_of(newest) < steps:
            advice = f"go on with --resume, name another --output, or delete {folder.name}/"
            raise TutorialError(f"{newest} of {steps} steps is unfinished: {advice}")


def save(
    model, tokenizer, profile: Profile, seed: int, proof, training: dict, output: Path, **more
) -> dict:
    """Write adapter (first) and results.json (last) to `output`; returns what results.json holds.

    `proof`: of `loading.prove_4bit`; `training`: of `fine_tune`; `more`: data and scores."""
    trainable, total = model.get_nb_trainable_parameters()
    status = Path("/proc/self/status")  # Linux tells there the most memory that a process has held
    peak = int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 if status.exists() else None
    record = {
        "profile": profile.name,
        "model": profile.model,
        "revision": profile.revision,
        "seed": seed,
        "settings": profile.settings(seed),
        "versions": environment.versions(),
        "parameters_total": total,
        "parameters_trainable": trainable,
        **proof._asdict(),
        "max_new_tokens": profile.max_new_tokens,
        **more,
        **{key: value for key, value in training.items() if key != "losses"},
        "total_seconds": round(time.time() - psutil.Process().create_time(), 2),
        "peak_rss_bytes": peak,
    }
    made = loading.save_adapter(model, output / "adapter", profile, record, tokenizer)
    (results := output / "results.json").unlink(missing_ok=True)  # it tells of the former adapter
    record["adapter_dir"] = str(made.relative_to(ROOT) if made.is_relative_to(ROOT) else made.name)
    environment.write_text(results, json.dumps(record, indent=2) + "\n")
    return record


def report(record: dict, test: Dataset, **answers: Sequence[str]) -> None:
    """Print three prompts, shortened, with their answers by name; then the scores."""
    for i, row in enumerate(test.select(range(min(3, len(test))))):
        print("message  ", repr(textwrap.shorten(row["prompt"], 300, placeholder=" ...")))
        for name, texts in (*answers.items(), ("wanted", test["answer"])):
            print(f"  {name:<8}{texts[i]!r}")
    columns = {"before": "before", "after": "after", "reworded": "after_reworded"}
    scores = {name: record[key] for name, key in columns.items() if record[key]}
    table = pd.DataFrame({name: score | score["fields"] for name, score in scores.items()})
    print(table.drop("fields").dropna().to_string(float_format="{:.3f}".format))


def run(
    profile: Profile,
    splits: dict[str, Dataset] | None = None,
    seed: int = 0,
    output: str | Path | None = None,
    resume: bool = False,
    scoring: bool = True,
    cache: str | None = None,
    data: str = "not named",
) -> dict | None:
    """The whole run; adapter and results.json, which is returned, go to `output` (runs/<profile>).

    `splits`: train, validation, test, perhaps test_reworded (default: the tickets); `data` names
    them. `scoring` False leaves the scores out; `cache`: see `loading.load_base`. Of several
    processes all train; the first alone scores and writes, the others return None."""
    state = PartialState(cpu=profile.device == "cpu")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        wrong = "with FSDP helpers.training would keep the whole model in every process"
        raise TutorialError(f"{wrong}: leave --use_fsdp out, and see notebook 08")
    mine = share(profile, state.num_processes)
    output = Path(os.path.expanduser(output or environment.runs_folder() / profile.name))
    environment.check_writable(output / "checkpoints")
    leads = state.is_main_process
    with checkpoints.only_run_in(output) if leads else contextlib.nullcontext():
        tokenizer = loading.load_tokenizer(profile)
        splits, data = (splits, data) if splits else (records.ticket_splits(), "data/tickets")
        splits, encoded = prompting.encode_splits(splits, tokenizer, profile.max_length)
        # an answer may take as many tokens as the longest in train, and a few more
        profile = replace(profile, max_new_tokens=prompting.answer_limit(encoded["train"]))
        batch, count = profile.micro_batch * profile.accumulation, len(encoded["train"])
        if count < batch:
            raise DataError(f"train has {count} of a step's {batch} examples: add or shorten some")
        state.print(", ".join(f"{len(rows):,} {name}" for name, rows in splits.items()), "examples")
        each = f"{mine.accumulation} x {mine.micro_batch} of the {batch} examples of a step"
        epochs = f"{batch * profile.max_steps / count:.2g}"
        state.print(f"processes: {state.num_processes}, each with {each}; {epochs} epochs")
        if resume:  # another run's checkpoint is told before the base is loaded
            identity = checkpoints.run_identity(profile, encoded["train"], seed)
            checkpoints.newest_checkpoint(output / "checkpoints", identity, profile.max_steps)
        else:
            refuse_to_lose(output / "checkpoints")
        with state.main_process_first() if cache else contextlib.nullcontext():  # it alone can save
            model = loading.load_base(profile, str(state.device), cache)
        proof, fingerprint = loading.prove_4bit(model), loading.base_fingerprint(model)
        layers, found, predicted = proof
        size = f"{layers} Linear4bit layers, {found:,} bytes (predicted {predicted:,})"
        state.print(f"{profile.model} in 4-bit: {size}")
        model = loading.attach_lora(model, profile, seed)  # B = 0: the function is still the base's
        scores = dict.fromkeys(("before", "perplexity_before", "after", "after_reworded"))
        scoring, limit = scoring and leads, profile.max_new_tokens

        def score(when: str, rows: Dataset) -> list[str]:
            said = prompting.generate(model, tokenizer, rows["prompt"], limit, profile.eval_batch)
            scores[when] = evaluation.score(said, rows["answer"])
            return said

        if scoring:
            before = score("before", splits["test"])
            perplexity = evaluation.perplexity(model, tokenizer, records.HELDOUT.read_text("utf-8"))
            scores["perplexity_before"] = round(perplexity, 4)
        state.wait_for_everyone()
        train, validation = encoded["train"], encoded["validation"]
        training = fine_tune(model, tokenizer, train, profile, output, seed, resume, validation)
        if loading.base_fingerprint(model) != fingerprint:
            raise NotQuantizedError("the 4-bit base changed in training: report the versions")
        if not leads:
            return None
        if scoring:
            after = score("after", splits["test"])
            if "test_reworded" in splits:
                score("after_reworded", splits["test_reworded"])
        record = save(model, tokenizer, profile, seed, proof, training, output, data=data, **scores)
        if scoring:
            report(record, splits["test"], before=before, after=after)
            if cut := prompting.cut_off(tokenizer, after, limit):
                print(f"{cut} of {len(after)} answers reach their limit of {limit} tokens")
        print("validation loss (nats a token):", *map("{:.4f}".format, record["validation_losses"]))
        trained = f"trained to step {record['steps']} in {record['train_seconds']:.0f} s"
        print(f"{trained}; adapter and results.json: {output}")
        return record


def write_recipe(path: str) -> None:
    """Write notebook 05's cells tagged `recipe` as one script; its data are the tickets, its model
    the tiny Falcon where there is no GPU, until its form says otherwise."""
    cells = json.loads((ROOT / "notebooks/05_finetune_falcon_7b.ipynb").read_text("utf-8"))["cells"]
    tagged = [cell for cell in cells if "recipe" in cell["metadata"].get("tags", ())]
    form, *others = ["".join(cell["source"]) for cell in tagged]
    unread = r"(?m)^(PROFILE|DROP_BAD_ROWS|RESUME|DRIVE|PUSH) = .*\n?|  # @param.*"
    form = re.sub(unread, "", form.replace("# @title ", "# "))
    changes = {"data/tickets/train.jsonl": str(records.TICKETS / "train.jsonl")}
    if not torch.cuda.is_available():
        tiny = profiles.PROFILES["tiny"].model_path
        changes |= {profiles.FALCON_7B: tiny, profiles.FALCON_7B_REVISION: ""}
    for old, new in changes.items():
        form = form.replace(f'"{old}"', repr(new))
    if Path(path).exists():
        raise TutorialError(f"{str(path)!r} is there already: name a new file")
    environment.write_text(Path(path), "\n\n\n".join([form, *others]) + "\n")
    print(f"written: {path}; its DATA are JSON lines with two columns of text")


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status as `environment.exit_status`."""
    parser = argparse.ArgumentParser("python -m helpers.training", description="Fine-tune by QLoRA")
    names, add = ", ".join(profiles.PROFILES), parser.add_argument
    add("--profile", default="tiny", help=f"auto or one of {names}; default tiny")
    add("--seed", type=whole_number(0, 2**32 - 1), default=0)
    add("--steps", dest="max_steps", metavar="N", type=whole_number(), help="default the profile's")
    add("--learning-rate", type=float, help="default the profile's")
    add("--save-steps", type=whole_number(), help="between checkpoints; default the profile's")
    add("--output", help="folder for adapter and checkpoints; default runs/<profile>")
    add("--resume", action="store_true", help="go on from the newest sound checkpoint")
    add("--data", help="a file or a hub data set, in place of the tickets")
    add("--prompt-column", action="append", help="of --data; may be given several times")
    add("--answer-column", help="of --data; one column")
    add("--split", default="train", help="of a hub data set or JSON; default train")
    add("--config", help="of a hub data set")
    add("--drop-bad-rows", action="store_true", help="leave out rows that cannot be used")
    add("--cache-4bit", metavar="DIR", help="keep the quantized base in DIR")
    add("--no-scoring", action="store_true", help="train and save only")
    add("--write-recipe", metavar="FILE", help="write notebook 05's recipe, and end")
    args = parser.parse_args(arguments)
    of_data = ("prompt_column", "answer_column", "split", "config")
    changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.write_recipe is not None and len(changed) > 1:
        parser.error("--write-recipe takes no other option: the script has a form")
    if args.data is None and changed & {*of_data, "drop_bad_rows"}:
        parser.error("columns, split, config and --drop-bad-rows are of --data: name it")

    def work() -> object:
        if args.write_recipe is not None:
            return write_recipe(os.path.expanduser(args.write_recipe))
        fields = {"max_steps", "save_steps", "learning_rate"} & changed
        profile = profiles.resolve(args.profile)
        profile = replace(profile, **{name: getattr(args, name) for name in fields})
        splits, data = None, "data/tickets"
        if args.data is not None:
            options = {name: getattr(args, name) for name in of_data}
            options["special_tokens"] = loading.load_tokenizer(profile).all_special_tokens
            dropped = [] if args.drop_bad_rows else None
            rows = records.read_records(args.data, dropped=dropped, **options)
            least = profile.micro_batch * profile.accumulation
            splits, data = records.own_splits(rows, dropped, args.seed, least), Path(args.data).name
        more = {"scoring": not args.no_scoring, "cache": args.cache_4bit, "data": data}
        return run(profile, splits, args.seed, args.output, args.resume, **more)

    return environment.exit_status(work, "interrupted: --resume goes on from a checkpoint, if any")


if __name__ == "__main__":
    sys.exit(main())
