"""Two processes do what one does, one of them killed: all from one start."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator, PartialState
from torch.distributed.tensor import DTensor
from transformers import DataCollatorForSeq2Seq

from helpers import checkpoints, loading, profiles, prompting, records, training
from helpers.environment import ROOT
from helpers.errors import TutorialError

SHORT = replace(profiles.PROFILES["tiny"], max_steps=12, save_steps=4)
TOLERANCE = 1e-4  # of each loss: sums in another order, and 8-bit Adam rounds what that moves


def fine_tune(output: Path, resume: bool = False) -> list[list[int]]:
    """A fine-tuning of 12 steps; returns the `input_ids` that it draws from."""
    tokenizer = loading.load_tokenizer(SHORT)
    encoded, _ = prompting.encode(records.read_tickets("train"), tokenizer, SHORT.max_length)
    model = loading.attach_lora(loading.load_base(SHORT), SHORT)
    training.fine_tune(model, tokenizer, encoded, SHORT, output, resume=resume)
    return encoded["input_ids"]


def two_processes(folder: Path) -> None:
    """What each of two processes does, one thing after another; at the end the second is killed."""
    rank, collate = PartialState(cpu=True).process_index, DataCollatorForSeq2Seq.__call__

    def recording(self, rows, *options):
        with (folder / f"seen-{rank}").open("a") as out:
            out.write(json.dumps([row["input_ids"] for row in rows]) + "\n")
        return collate(self, rows, *options)

    DataCollatorForSeq2Seq.__call__ = recording
    fine_tune(folder / "trained")
    DataCollatorForSeq2Seq.__call__ = collate
    one = replace(SHORT, max_steps=1)
    training.run(one, output=folder / "cached", scoring=False, cache=str(folder / "copies"))

    os.environ["ACCELERATE_USE_FSDP"] = "true"  # as `accelerate launch --use_fsdp` does
    model = Accelerator(cpu=True).prepare(loading.attach_lora(loading.load_base(SHORT), SHORT))
    found = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    (folder / f"accelerate-{rank}").write_text(f"{type(model).__name__} {found}")
    del os.environ["ACCELERATE_USE_FSDP"]

    def die(self, args, state, *more, **options):
        if rank == 1 and state.global_step == SHORT.save_steps + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.Checkpoints.on_step_begin = die
    fine_tune(folder / "killed")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The folder that two processes wrote to."""
    folder = tmp_path_factory.mktemp("several")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launch += ["--config_file", "helpers/launch/ddp.yaml", "-m", "tests.test_beyond", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, timeout=900)
    assert done.returncode and (folder / "killed/checkpoints").exists(), done.stderr.decode()
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder, examples) of the same fine-tuning in one process, this one."""
    return (output := tmp_path_factory.mktemp("alone")), fine_tune(output)


def course(output: Path) -> tuple:
    """(steps, tokens seen by all processes so far, losses) of a finished run."""
    state = json.loads((output / "checkpoints/checkpoint-12/trainer_state.json").read_text())
    log = [row for row in state["log_history"] if "loss" in row]
    assert len(log) == SHORT.max_steps
    return tuple([row[key] for row in log] for key in ("step", "num_input_tokens_seen", "loss"))


def same_course(output: Path, other: Path) -> None:
    (*ours, losses), (*theirs, wanted) = course(output), course(other)
    assert ours == theirs and losses == pytest.approx(wanted, rel=TOLERANCE)


def test_two_processes_do_what_one_does(several, alone):
    output, rows = alone
    assert len(list((several / "copies").glob("*[!k]"))) == 1  # 4-bit base, made by one of them
    same_course(several / "trained", output)
    names = {path.name for path in (several / "trained").glob("checkpoints/checkpoint-12/*")}
    extra = names ^ {path.name for path in output.glob("checkpoints/checkpoint-12/*")}
    assert extra == {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}, "one set of files"
    order = prompting.length_grouped_order([len(ids) for ids in rows], 16, SHORT.max_steps, 0)
    files = [(several / f"seen-{rank}").read_text().splitlines() for rank in range(2)]
    assert [len(batches) for batches in files] == [SHORT.max_steps] * 2
    for step, (first, second) in enumerate(zip(*files, strict=True)):
        wanted = [rows[i] for i in order[16 * step : 16 * (step + 1)]]
        assert sorted(json.loads(first) + json.loads(second)) == sorted(wanted), "each example once"


def test_a_killed_process_ends_the_run_and_one_process_resumes_it(several, alone):
    folder = several / "killed" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]
    fine_tune(several / "killed", resume=True)
    same_course(several / "killed", alone[0])


def test_what_cannot_be_shared_or_is_not_sharded(several, monkeypatch, tmp_path):
    t4 = profiles.PROFILES["colab-t4"]  # 4 x 4
    shares = [training.share(t4, processes) for processes in (1, 2, 8)]
    assert [(p.accumulation, p.micro_batch) for p in shares] == [(4, 4), (2, 4), (1, 2)]
    words = "3 processes cannot share the 16 examples .* 1, 2, 4, 8, 16"
    for profile in (t4, SHORT):
        with pytest.raises(TutorialError, match=words):
            training.share(profile, 3)
    found = [(several / f"accelerate-{rank}").read_text() for rank in range(2)]
    assert found == ["DistributedDataParallel 0"] * 2, "accelerate's FSDP: no DTensor, no error"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TutorialError, match="leave --use_fsdp out"):
        training.run(SHORT, output=tmp_path, scoring=False)


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))
