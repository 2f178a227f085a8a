"""Checkpoints that are proven sound, and the clean stop on Ctrl-C. Imports files, processes, profiles and errors."""

import contextlib
import hashlib
import json
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset
from transformers import Trainer, TrainerCallback

from helpers import files, processes
from helpers.errors import CheckpointError
from helpers.files import writing
from helpers.profiles import Profile

MARKER = "complete.json"  # written last into a checkpoint: what makes it sound


def run_identity(profile: Profile, encoded: Dataset, seed: int) -> str:
    """A hash of all that decides a run's numbers: profile, seed, encoded examples. A checkpoint of another identity is not resumed."""
    digest = hashlib.sha256(json.dumps([asdict(profile), seed]).encode())
    for row in encoded:
        digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def whole_or_gone(folder: Path) -> Iterator[None]:
    """If writing the checkpoint `folder` fails while this is active, no half of it is left behind. OutputError for what the disk refuses."""
    with writing(folder):
        try:
            yield
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def seal(folder: Path, identity: str, **more) -> None:
    """Write the marker of a checkpoint: its run's identity, every file's hash, and what else is to be remembered. OutputError if it cannot be."""
    with whole_or_gone(folder):
        (folder / MARKER).unlink(missing_ok=True)
        hashes = {}
        for path in sorted(folder.iterdir()):
            files.flush(path)
            hashes[path.name] = files.sha256(path)
        files.write_text(folder / MARKER, json.dumps({"identity": identity, "files": hashes, **more}))


class SoundCheckpoints(TrainerCallback):
    """After each save, write a marker with the run's identity and every file's hash. A save that was cut off has no valid marker.

    Of several processes the first writes the marker, when all have written what is theirs.
    """

    def __init__(self, identity: str):
        self.identity = identity

    def on_save(self, args, state, control, **kwargs):
        processes.wait_for_all()
        if not state.is_world_process_zero:
            return
        seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.identity)


class SafeTrainer(Trainer):
    """A Trainer that tells in one sentence that a checkpoint could not be written, and leaves no half of it."""

    def _save_checkpoint(self, *args, **kwargs):
        with whole_or_gone(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)


class StopOnInterrupt(TrainerCallback):
    """Turns Ctrl-C (or a kernel interrupt) into: finish this step, save a checkpoint, stop. A second one stops at once.

    Of several processes, all stop after the same step as soon as one of them was asked to.
    """

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        if self.in_main_thread:
            self.previous = signal.signal(signal.SIGINT, self.ask)
        return self

    def __exit__(self, *exception):
        if self.in_main_thread:
            signal.signal(signal.SIGINT, self.previous)

    def ask(self, *signal_and_frame):
        self.asked = True
        signal.signal(signal.SIGINT, self.previous)

    def on_step_end(self, args, state, control, **kwargs):
        self.asked = processes.any_of(self.asked, args.device)
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control


def is_sound(checkpoint: Path) -> bool:
    """Whether the marker is there and every file it names has the hash it had when it was saved."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text())
        return all(files.sha256(checkpoint / name) == value for name, value in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def by_step(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, sound or not, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def discard_unsound(folder: Path) -> None:
    """Delete what killed runs left in a folder of checkpoints. The Trainer deletes the oldest checkpoints, not asking which are sound: half
    a checkpoint would take the place of a good one.
    """
    for left in folder.glob("checkpoint-*.part"):
        files.remove(left)
    for checkpoint in by_step(folder):
        if not is_sound(checkpoint):
            files.discard(checkpoint)


def newest_checkpoint(output: Path, identity: str) -> Path | None:
    """The newest sound checkpoint of this run, None if there is none; CheckpointError if the newest sound one is of another run."""
    for folder in by_step(output / "checkpoints"):
        if is_sound(folder):
            if json.loads((folder / MARKER).read_text())["identity"] != identity:
                raise CheckpointError(
                    f"{folder.name} in {str(output)!r} belongs to a run with another profile, seed or data: choose another --output, or start anew without --resume"
                )
            return folder
    return None


def cut_off(trainer: Trainer) -> bool:
    """Whether a sound checkpoint of this very run, from before its last step, lies in its folder: what `train(resume=True)` goes on from.

    A finished run, or one with another profile, seed or data, was not cut off: it starts anew.
    """
    identity = next(c.identity for c in trainer.callback_handler.callbacks if isinstance(c, SoundCheckpoints))
    try:
        newest = newest_checkpoint(Path(trainer.args.output_dir).parent, identity)
    except CheckpointError:
        return False
    return newest is not None and step_of(newest) < trainer.args.max_steps
