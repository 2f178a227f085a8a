"""Adapters in use: find or train one, put several on one base, answer a batch in which each row has its own. Imports training, and so all below it."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peft import PeftModel
from transformers import FalconForCausalLM

from helpers import evaluation, files, loading, prompting, records, results, training
from helpers.errors import AdapterError, TutorialError
from helpers.profiles import ROOT, Profile

BASE = "__base__"  # peft's name for "no adapter" in a mixed batch


@dataclass(frozen=True)
class Task:
    """What an adapter learns from the customer messages. Both tasks are scored against the tickets of the messages."""

    column: str  # of data/tickets: what the answer is
    describes: str
    score: Callable[[Sequence[str], Sequence[str]], dict]
    headline: str  # the key of the score that says how many answers are right as a whole
    # Of the profile's training steps. Complete replies on the tiny profile's validation split: 0.95 after 300 steps, 0.98 after 400.
    share_of_steps: float


TASKS = {
    "ticket": Task("ticket", "a customer's message to a ticket, one line of JSON", evaluation.score_tickets, "exact_match", 1.0),
    "reply": Task("reply", "a customer's message to a short, polite reply", evaluation.score_replies, "complete", 2 / 3),
}


@dataclass(frozen=True)
class Trained:
    """A trained adapter: its folder, and the record of its training (results.json beside it)."""

    folder: Path
    record: dict

    @property
    def answers(self) -> list[str] | None:
        """The answers to the test split at the end of training, if they were stored (notebook 05 stores their scores only)."""
        path = self.folder.parent / "answers.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def trained(task: str, profile: Profile, seed: int = 0) -> Trained:
    """The adapter of a task ("ticket", "reply") for a profile: notebook 05's or an earlier one in runs/ if it is sound and was trained
    on this base with these settings, else trained now. AdapterError for an unknown task.
    """
    if task not in TASKS:
        raise AdapterError(f"there is no task {task!r}: choose one of {', '.join(TASKS)}")
    profile = replace(profile, max_steps=round(TASKS[task].share_of_steps * profile.max_steps))
    own = ROOT / "runs" / f"{profile.name}-{task}-adapter"
    fingerprint = loading.base_fingerprint(loading.load_base(profile))
    for folder in [ROOT / "runs" / f"{profile.name}-notebook"] * (task == "ticket") + [own]:
        if not folder.exists():
            continue
        try:
            found = read_trained(folder, profile, fingerprint, seed)
        except TutorialError as reason:
            print(f"{task} adapter in runs/{folder.name} is left aside: {str(reason).replace(f'{ROOT}{os.sep}', '')}")
        else:
            print(f"{task} adapter: found in runs/{folder.name}, {found.record['steps']} steps")
            return found
    print(f"{task} adapter: training it now, {profile.max_steps} steps, into runs/{own.name}")
    return train_adapter(task, profile, own, seed)


def read_trained(output: Path, profile: Profile, fingerprint: str, seed: int = 0) -> Trained:
    """The adapter of a run's folder. AdapterError unless it is whole and its record names this profile's base, settings, seed and versions."""
    folder = output / "adapter"
    loading.check_adapter(folder, profile, loading.load_config(profile))
    try:
        record = json.loads((output / "results.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        found = {key: record[key] for key in ("profile", "steps", "seed", "versions")}
        found["base_sha256"] = (folder / loading.BASE_SHA256).read_text().strip()
        found |= {key: config[key] for key in ("r", "lora_alpha")} | {"target_modules": sorted(config["target_modules"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"results.json in {output.name!r} does not say how the adapter was trained ({error!r}): train it again"
        ) from error
    wanted = {
        "profile": profile.name,
        "steps": profile.max_steps,
        "seed": seed,
        "versions": results.versions(),
        "r": profile.lora_r,
    }
    wanted |= {"base_sha256": fingerprint, "lora_alpha": profile.lora_alpha, "target_modules": sorted(profile.target_modules)}
    for key, value in wanted.items():
        if found[key] != value:
            raise AdapterError(f"it was trained with {key} {found[key]!r} and {value!r} is asked for: train it again")
    return Trained(folder, record)


def train_adapter(task: str, profile: Profile, output: Path, seed: int = 0) -> Trained:
    """Train a task's adapter with the profile's steps; write adapter, answers to the test split, and results.json (last) to `output`."""
    output = training.output_folder(profile, output)
    tokenizer = loading.load_tokenizer(profile)
    encoded, _ = prompting.encode(records.read_tickets("train", TASKS[task].column), tokenizer, profile.max_length)
    model = loading.load_base(profile)
    proof = loading.prove_4bit(model)
    model = loading.attach_lora(model, profile, seed)
    outcome = training.train(training.build_trainer(model, tokenizer, encoded, profile, output, seed))
    folder = loading.save_adapter(model, output / "adapter")
    test = records.read_tickets("test")
    answers = prompting.generate(model, tokenizer, test["prompt"], profile.max_new_tokens, profile.eval_batch, progress=False)
    with files.writing(output / "answers.json"):
        files.write_text(output / "answers.json", json.dumps(answers))
    scores = {"task": task, "after": TASKS[task].score(answers, test["answer"])}
    record = results.collect(profile, seed, model, proof, scores, outcome, outcome["train_seconds"], folder)
    results.write(record, output)
    return Trained(folder, record)


def load_adapters(base: FalconForCausalLM, folders: Mapping[str, str | Path], profile: Profile) -> PeftModel:
    """Put the adapters of `folders` (name: folder) on one base; the first is active. Each is proven sound and of this base before any is
    loaded; AdapterError if one is not, or if a name cannot be used.
    """
    if not folders:
        raise AdapterError("no adapter is named: give at least one name and folder")
    for name, folder in folders.items():
        if name == BASE or not name or "." in name or os.sep in name:
            raise AdapterError(f"{name!r} cannot be the name of an adapter: choose one without dots, not {BASE!r}")
        loading.check_adapter(folder, profile, base.config)
    (first, folder), *others = folders.items()
    model = PeftModel.from_pretrained(base, str(folder), adapter_name=first, is_trainable=False)
    for name, folder in others:
        model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
    return model.eval()


def check_names(model: PeftModel, names: Sequence[str]) -> None:
    """AdapterError unless every name is that of an adapter on `model`, or BASE."""
    unknown = sorted(set(names) - set(model.peft_config) - {BASE})
    if unknown:
        raise AdapterError(f"there is no adapter {unknown[0]!r} on this model: choose of {', '.join([*model.peft_config, BASE])}")


def generate_mixed(model: PeftModel, tokenizer, prompts: Sequence[str], names: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy answers to one batch, row i by adapter `names[i]` (BASE: none), in one pass a token. AdapterError for an unknown name."""
    if len(prompts) != len(names):
        raise AdapterError(f"{len(prompts)} prompts and {len(names)} adapter names do not pair: give one name for each prompt")
    check_names(model, names)
    model.eval()  # peft refuses mixed batches in training mode
    return prompting.generate_batch(model, tokenizer, prompts, max_new_tokens, adapter_names=list(names))
