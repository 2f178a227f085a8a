"""What a long run needs around the Trainer: checkpoints proven complete, a clean stop, progress.

A checkpoint counts only with its marker, which is written last and holds every file's hash."""

import contextlib
import hashlib
import json
import math
import re
import shutil
import signal
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from filelock import FileLock, Timeout
from huggingface_hub.utils import is_notebook
from tqdm import tqdm
from transformers import TrainerCallback

from helpers.environment import write_text, writing
from helpers.errors import TutorialError
from helpers.profiles import Profile

MARKER = "complete.json"
ROWS = "the training rows"
SKIPPED = 24  # steps in a row, of a T4's 32, that loss scaling may skip: more learn nothing


def run_identity(profile: Profile, encoded: Dataset, seed: int) -> dict:
    """What decides a run's numbers, but its length, save interval and `attach_lora`'s options."""
    digest = hashlib.sha256()
    for ids, labels in zip(encoded["input_ids"], encoded["labels"], strict=True):
        digest.update(json.dumps([ids, labels]).encode())
    decides = replace(profile, max_steps=1, save_steps=1).settings(seed)
    return decides | {ROWS: digest.hexdigest()}


def hashes(checkpoint: Path) -> dict[str, str]:
    """The sha256 of each file of a checkpoint but its marker, by name."""
    files = [path for path in checkpoint.iterdir() if path.is_file() and path.name != MARKER]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def mark_complete(folder: Path, run: dict) -> None:
    """Write a checkpoint's marker: its run's identity and every file's hash."""
    write_text(folder / MARKER, json.dumps({"run": run, "files": hashes(folder)}))


def is_sound(checkpoint: Path) -> bool:
    """Whether the marker is there and every file it names has the hash it had when it was saved."""
    try:
        told = json.loads((checkpoint / MARKER).read_text())
        return isinstance(told["run"], dict) and told["files"].items() <= hashes(checkpoint).items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def found_in(folder: Path) -> list[Path]:
    """The folders of the checkpoints in a folder, sound or not, in their order."""
    paths = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    return sorted((p for p in paths if re.fullmatch(r"checkpoint-\d+", p.name)), key=step_of)


def remove_all(folder: Path, but: Iterable[Path] = ()) -> None:
    """Delete a folder's checkpoints `but` these; half of one never counts, as files are missing."""
    for path in [path for path in found_in(folder) if path not in but]:
        shutil.rmtree(path)


def newest_checkpoint(folder: Path, run: dict, steps: int, remove: bool = False) -> Path | None:
    """The newest sound checkpoint in `folder` for a run of so many steps; None if there is none.
    `remove` deletes unsound ones: the Trainer keeps the newest two, sound or not. TutorialError,
    which names what differs, if the newest sound one is past these steps or of another run."""
    sound = [path for path in found_in(folder) if is_sound(path)]
    if sound:
        theirs = json.loads((sound[-1] / MARKER).read_text())["run"]
        other = [key for key in run | theirs if run.get(key) != theirs.get(key)]
        why = [k if k == ROWS else f"{k} {theirs.get(k)!r}, now {run.get(k)!r}" for k in other]
        if step_of(sound[-1]) > steps:
            why.append(f"this one ends at step {steps}")
        if why:
            wrong = f"{sound[-1].name} belongs to another run ({'; '.join(why)})"
            raise TutorialError(f"{wrong}: repeat its options, change the folder, or delete it")
    if remove:
        remove_all(folder, but=sound)
    return sound[-1] if sound else None


def only_run_in(folder: Path) -> contextlib.AbstractContextManager:
    """Hold `folder` for this run: TutorialError while another process trains in it (one that died
    holds nothing back), or if its `adapter` is none. The thread that holds it may ask again."""
    if any(folder.glob("adapter/*")) and not any(folder.glob("adapter/adapter_*")):
        raise TutorialError(f"{str(folder / 'adapter')!r} is no adapter: choose another folder")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(folder / "run.lock", is_singleton=True).acquire(timeout=0)
        except Timeout:
            wrong = f"another run trains in {str(folder)!r}: wait for it, or choose another folder"
            raise TutorialError(wrong) from None


class Checkpoints(TrainerCallback):
    """After each save the first process writes the marker, when all have written what is theirs."""

    def __init__(self, run: dict):
        self.run = run

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.run)


class StopOnInterrupt(TrainerCallback):
    """Turns Ctrl-C (or a kernel interrupt) into: finish this step, save a checkpoint, and raise a
    KeyboardInterrupt that says how to go on; a second one stops at once. All processes stop."""

    previous = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.asked = False
        with contextlib.suppress(ValueError):  # only the main thread may ask for signals
            self.previous = signal.signal(signal.SIGINT, self.ask)

    def ask(self, *signal_and_frame):
        self.asked = True
        signal.signal(signal.SIGINT, self.previous)

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            self.asked = any(gather_object([self.asked]))
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.release()
        if self.asked and state.global_step < state.max_steps:
            stopped = f"stopped at step {state.global_step} of {state.max_steps}"
            advice = "run again with --resume (in notebook 05: restart, Run all) to go on"
            raise KeyboardInterrupt(f"{stopped}; its checkpoint is saved, {advice}")

    def release(self) -> None:
        """Give Ctrl-C back to whoever had it before training."""
        if self.previous:
            signal.signal(signal.SIGINT, self.previous)


class StopOnDivergence(TrainerCallback):
    """TutorialError, before it is saved, at the first step whose loss or gradient is not finite; in
    float16, where loss scaling skips such gradients, only after SKIPPED of them in a row."""

    skipped = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss, norm = logs.get("loss", logs.get("eval_loss", 0.0)), logs.get("grad_norm")
        if "loss" in logs:
            self.skipped = 0 if math.isfinite(norm or 0.0) else self.skipped + 1
        if not math.isfinite(loss) or self.skipped > (SKIPPED if args.fp16 else 0):
            wrong = f"the loss at step {state.global_step} is {loss} and the gradients have"
            advice = f"lower the learning rate ({args.learning_rate:g}), lengthen the warm-up"
            advice += ", or take a card with bfloat16" if args.fp16 else ""
            raise TutorialError(f"{wrong} the norm {norm}: {advice}")


class Progress(TrainerCallback):
    """A bar in a terminal, a live figure in a notebook, each with the minutes that are left."""

    bar = figure = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first, self.drawn = time.monotonic(), state.global_step, 0.0
        state.compute_steps(args, state.max_steps)  # resuming has brought the former intervals
        if state.is_world_process_zero and not is_notebook():
            self.bar = tqdm(total=state.max_steps, initial=self.first, desc="training", unit="step")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
            self.bar.update(state.global_step - self.bar.n)
        elif "loss" in logs and time.monotonic() - self.drawn > 2:  # seconds
            seconds = (time.monotonic() - self.began) / (state.global_step - self.first)
            self.draw(state, seconds * (state.max_steps - state.global_step))

    def draw(self, state, left: float | None) -> None:
        if state.is_world_process_zero and is_notebook() and state.global_step:
            from helpers import plotting  # it takes a second, and command lines draw nothing

            self.figure = plotting.show_loss(state.log_history, state.max_steps, left, self.figure)
            self.drawn = time.monotonic()

    def on_train_end(self, args, state, control, **kwargs):
        self.draw(state, None)
        self.close()

    def close(self) -> None:
        """End the bar, so that what is printed next begins on a line of its own."""
        if self.bar:
            self.bar.close()
