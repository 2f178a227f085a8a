"""Two processes do what one does, one of them killed, one model sharded: all from one start."""

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from torch.distributed.tensor import DTensor
from transformers import DataCollatorForSeq2Seq

from helpers import checkpoints, loading, memory, profiles, prompting, records, sharding, training
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
    sharding.run(replace(SHORT, max_steps=6), folder / "sharded")

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


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory):
    """The sharded run's loop in one process: 10 steps."""
    return sharding.run(replace(SHORT, max_steps=10), tmp_path_factory.mktemp("unsharded"))


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


def test_fsdp2_shards_every_parameter_and_halves_the_bytes(several, unsharded):
    record = json.loads((several / "sharded" / "sharding.json").read_text())
    config = memory.known_config("data/tiny-falcon")
    assert record["sharded_parameters"] == 16 + 32 + 1 + 2 * 5  # 4-bit, A and B, embedding, norms
    assert record["parameters"] * 2 == record["parameters_whole"] == unsharded["parameters"]
    assert record["packed"] * 2 == record["packed_whole"] == memory.packed_bytes(config)
    plan = memory.card_plan(config, SHORT, "qlora", 2, "fsdp")
    stored = plan.weights + plan.adapter + plan.rest - memory.buffer_bytes(config)
    assert (record["parameters"], record["constants"]) == (stored, plan.constants)


def test_fsdp2_gives_the_losses_and_the_bits_of_one_process_which_goes_on(several, unsharded, base):
    output = several / "sharded"
    record = json.loads((output / "sharding.json").read_text())
    assert record["losses"] == pytest.approx(unsharded["losses"][:6], rel=TOLERANCE)
    assert record["base_sha256"] == unsharded["base_sha256"] == loading.base_fingerprint(base)
    adapted = loading.load_adapter(base, output / "adapter", SHORT)  # an ordinary adapter
    assert all(p.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)
    onward = sharding.run(replace(SHORT, max_steps=10), output, resume=True)
    assert onward["first_step"] == 6
    assert onward["losses"] == pytest.approx(unsharded["losses"][6:], rel=TOLERANCE)


def test_what_cannot_be_shared_or_is_not_sharded(several, base, monkeypatch, tmp_path):
    share = checkpoints.share(replace(SHORT, accumulation=4), 2)
    assert (share.accumulation, share.micro_batch) == (2, 16)
    with pytest.raises(TutorialError, match="3 processes cannot share the 16 examples"):
        checkpoints.share(SHORT, 3)
    found = [(several / f"accelerate-{rank}").read_text() for rank in range(2)]
    assert found == ["DistributedDataParallel 0"] * 2, "accelerate's FSDP: no DTensor, no error"
    with pytest.raises(TutorialError, match="27 of 27 parameters are not sharded"):
        sharding.prove_sharded(base)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TutorialError, match="leave --use_fsdp out"):
        training.run(SHORT, output=tmp_path, scoring=False)
    with pytest.raises(TutorialError, match="computes in float16"):
        sharding.run(replace(SHORT, compute_dtype="float16"), tmp_path)


def test_a_sharded_checkpoint_on_a_full_disk_does_not_count(base, tmp_path):
    model = loading.attach_lora(base, SHORT)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-3)
    sharding.save_sharded(model, optimizer, tmp_path / "checkpoint-1", "mine")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(TutorialError, match="checkpoint-2 cannot be written .* make room"):
            sharding.save_sharded(model, optimizer, tmp_path / "checkpoint-2", "mine")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert checkpoints.newest_checkpoint(tmp_path, "mine").name == "checkpoint-1"
    part = next((tmp_path / "checkpoint-1").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    assert checkpoints.newest_checkpoint(tmp_path, "mine") is None


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))
