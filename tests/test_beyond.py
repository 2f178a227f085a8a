"""One run on several processes: same losses, every example once, one set of files; a lost process, a full disk, FSDP2 for real."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import TrainerCallback

from helpers import checkpoints, loading, memory, processes, profiles, prompting, records, scaling, sharding, training
from helpers.errors import CheckpointError, DataError, LaunchError, NotShardedError, OutputError, PlanError, ProfileError
from helpers.profiles import ROOT

DDP, FSDP2 = ROOT / "helpers" / "launch" / "ddp.yaml", ROOT / "helpers" / "launch" / "fsdp2.yaml"
SHORT = dataclasses.replace(profiles.PROFILES["tiny"], max_steps=16, save_steps=4)
STEPS = ("--steps", str(SHORT.max_steps), "--save-steps", str(SHORT.save_steps))
TOLERANCE = 1e-4  # relative, of each step's loss: sums are taken in another order, and Adam's 8-bit state rounds what that moves
# helpers.training, with every process writing down the examples that it trains on
RECORDING = """
import json, os, sys
from helpers import prompting, training
collate = prompting.Collator.__call__
def recording(self, examples):
    with open(os.environ["SEEN"] + os.environ["RANK"], "a") as out:
        out.write(json.dumps([example["input_ids"] for example in examples]) + "\\n")
    return collate(self, examples)
prompting.Collator.__call__ = recording
sys.exit(training.main(sys.argv[1:]))
"""


def launch(count: int, *command: str, **environment: str) -> subprocess.Popen:
    """`accelerate launch` with `count` processes on this machine's CPU."""
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(DDP), "--num_processes", str(count)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | environment
    return subprocess.Popen(
        [*start, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """Its output, after it ended well; on failure or after 5 minutes everything that it started is ended too."""
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, err
    return out, err


def history(folder: Path) -> list[tuple[int, float, int]]:
    """(step, loss, tokens seen so far by all processes) of a finished run."""
    state = json.loads((folder / "checkpoints" / f"checkpoint-{SHORT.max_steps}" / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"], entry["num_input_tokens_seen"]) for entry in state["log_history"] if "loss" in entry]


def same_course(folder: Path, other: Path) -> None:
    """Equal steps and tokens, losses equal to TOLERANCE, in two finished runs."""
    ours, theirs = history(folder), history(other)
    assert [row[0] for row in ours] == [row[0] for row in theirs] == list(range(1, SHORT.max_steps + 1))
    assert [row[2] for row in ours] == [row[2] for row in theirs]
    assert [row[1] for row in ours] == pytest.approx([row[1] for row in theirs], rel=TOLERANCE)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "rng_state" not in p.name}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The runs in this process compute with one thread, as the ones in several do: two threads among busy neighbours wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run in one process, this one: the measure of the others."""
    folder = tmp_path_factory.mktemp("alone")
    training.run(SHORT, output=folder, scoring=False)
    return folder


@pytest.fixture(scope="module")
def encoded():
    return prompting.encode(records.read_tickets("train"), loading.load_tokenizer(SHORT), SHORT.max_length)[0]


# --- data parallel ----------------------------------------------------------------------------------------------------------


def test_two_processes_do_what_one_does(alone, encoded, tmp_path):
    script, folder, seen = tmp_path / "record.py", tmp_path / "run", str(tmp_path / "seen-")
    script.write_text(RECORDING)
    out, err = finish(launch(2, str(script), *STEPS, "--no-scoring", "--output", str(folder), SEEN=seen))
    same_course(folder, alone)
    assert (
        out.count("training examples") == out.count("trained 16 steps") == out.count("processes: 2, each with 8 of the 16") == 1
    )
    assert "find_unused_parameters" not in err
    # one set of files, besides the state of each process's random numbers
    assert files(folder) == files(alone)
    # every example of every step once, in one of the two processes
    order = prompting.length_grouped_order([len(ids) for ids in encoded["input_ids"]], 16, SHORT.max_steps, 0)
    ranks = [[json.loads(line) for line in Path(seen + rank).read_text().splitlines()] for rank in "01"]
    assert [len(batches) for batches in ranks] == [SHORT.max_steps] * 2
    for step in range(SHORT.max_steps):
        wanted = encoded.select(order[16 * step : 16 * (step + 1)])["input_ids"]
        assert sorted(ranks[0][step] + ranks[1][step]) == sorted(wanted)


def test_a_killed_process_ends_the_run_and_another_number_resumes_it(alone, tmp_path):
    process = launch(2, "-m", "helpers.training", *STEPS, "--no-scoring", "--output", str(tmp_path))
    deadline = time.monotonic() + 200
    while not (tmp_path / "checkpoints" / "checkpoint-4" / checkpoints.MARKER).exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (victim,) = [c for c in psutil.Process(process.pid).children(recursive=True) if c.environ().get("RANK") == "1"]
    victim.kill()
    killed = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert err.count("ProcessLostError: process 0 of 2 stopped because another process") == 1
    assert "run the same command with --resume" in err
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "results.json").exists()
    training.run(SHORT, output=tmp_path, scoring=False, resume=True)  # one process in place of two
    same_course(tmp_path, alone)


@pytest.mark.parametrize(
    ("accumulation", "size", "shared"),
    [(1, 1, (1, 16)), (1, 2, (1, 8)), (1, 16, (1, 1)), (4, 2, (2, 16)), (4, 8, (1, 8)), (3, 6, (1, 8))],
)
def test_shares_make_the_whole(accumulation, size, shared):
    profile = dataclasses.replace(SHORT, accumulation=accumulation)
    mine = processes.share(profile, size)
    assert (mine.accumulation, mine.micro_batch) == shared
    assert mine.accumulation * mine.micro_batch * size == profile.accumulation * profile.micro_batch


@pytest.mark.parametrize("size", [0, 3, 5, 32, 2400])
def test_a_number_of_processes_that_cannot_share(size):
    with pytest.raises(LaunchError, match=f"{size} processes cannot"):
        processes.share(SHORT, size)


def test_a_wrong_number_of_processes_is_told_once_before_anything_is_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(loading, "load_base", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert training.main(["--output", str(tmp_path / "run")]) == sharding.main(["--output", str(tmp_path / "run")]) == 1
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 2 * lines
        assert all("LaunchError: 3 processes cannot share the 16 examples" in line and "1, 2, 4, 8, 16" in line for line in told)
    assert not (tmp_path / "run").exists()


def test_more_processes_than_examples(monkeypatch, tmp_path):
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"question {i}", "answer": "yes"}) + "\n" for i in range(12)))
    monkeypatch.setattr(loading, "load_base", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(DataError, match="a step takes 16 examples and there are .* to train on"):
        training.run(SHORT, data=str(data), output=tmp_path / "run", scoring=False)


@pytest.mark.parametrize("steps", ["0", "-3", "many", "1.5"])
def test_a_number_of_steps_that_is_none(steps, capsys):
    with pytest.raises(SystemExit):
        training.main(["--steps", steps])
    assert "is no number of steps: give a whole number from 1 to 1,000,000" in capsys.readouterr().err


# --- a full disk ------------------------------------------------------------------------------------------------------------


class DiskIsFull(TrainerCallback):
    """From the end of the step after the first checkpoint on, no file of more than 100 kB can be written."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == SHORT.save_steps + 1:
            limit_files(100_000)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def roomy_again():
    yield
    limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(base, tokenizer, encoded, alone, tmp_path, roomy_again):
    trainer = training.build_trainer(loading.attach_lora(base, SHORT), tokenizer, encoded, SHORT, tmp_path)
    trainer.add_callback(DiskIsFull())
    with pytest.raises(OutputError, match="checkpoint-8 could not be written to .* make room on that disk, then .* --resume"):
        training.train(trainer)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-4"]
    assert checkpoints.newest_checkpoint(tmp_path, checkpoints.run_identity(SHORT, encoded, 0)).name == "checkpoint-4"
    limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    training.run(SHORT, output=tmp_path, scoring=False, resume=True)
    same_course(tmp_path, alone)


def test_a_marker_that_cannot_be_written_makes_no_checkpoint(tmp_path, roomy_again):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(1000))
    limit_files(10)
    with pytest.raises(OutputError, match="checkpoint-1 could not be written"):
        checkpoints.seal(folder, "mine")
    limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])  # before pytest itself writes
    assert not folder.exists()


def test_sharded_checkpoint_on_a_full_disk(base, tmp_path, roomy_again):
    model = loading.attach_lora(base, SHORT)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-3)
    sharding.save_sharded(model, optimizer, 1, "mine", tmp_path / "good")
    limit_files(100_000)
    with pytest.raises(OutputError, match="could not be written"):
        sharding.save_sharded(model, optimizer, 2, "mine", tmp_path / "good")
    limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert [p.name for p in tmp_path.iterdir()] == ["good"]
    assert sharding.load_sharded(model, optimizer, "mine", tmp_path / "good") == 1


# --- FSDP2 ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The sharded run's loop in one process, nothing sharded: 10 steps."""
    return sharding.run(dataclasses.replace(SHORT, max_steps=10, save_steps=10), tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """6 steps on two processes, and their folder."""
    folder = tmp_path_factory.mktemp("sharded")
    finish(launch(2, "-m", "helpers.sharding", "--steps", "6", "--output", str(folder)))
    return json.loads((folder / "sharding.json").read_text()), folder


def test_fsdp2_shards_every_parameter_and_halves_the_bytes(sharded, whole):
    record, _ = sharded
    config = memory.known_config("data/tiny-falcon")
    assert record["processes"] == 2
    assert record["sharded_parameters"] == 16 + 32 + 1 + 2 * 5  # 4-bit weights, A and B, embedding, norms
    assert record["parameters"] * 2 == record["parameters_whole"] == whole["parameters"]
    assert record["packed"] * 2 == record["packed_whole"] == memory.packed_bytes(config)
    plan = scaling.card_plan(config, SHORT, "qlora", 2, "fsdp")
    assert record["parameters"] == plan.weights + plan.adapter + plan.rest - memory.buffer_bytes(config)
    assert record["constants"] == plan.constants


def test_fsdp2_gives_the_losses_and_the_bits_of_one_process(sharded, whole, tiny, tokenizer):
    record, folder = sharded
    assert record["losses"] == pytest.approx(whole["losses"][:6], rel=TOLERANCE)
    base = loading.load_base(tiny)
    assert record["base_sha256"] == whole["base_sha256"] == loading.base_fingerprint(base)
    adapted = loading.load_adapter(base, folder / "adapter", tiny)  # gathered into an ordinary adapter
    assert loading.trainable_parameters(adapted) == 0
    assert all(p.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)


def test_a_sharded_checkpoint_goes_on_in_one_process(sharded, whole):
    _, folder = sharded
    record = sharding.run(dataclasses.replace(SHORT, max_steps=10, save_steps=10), folder, resume=True)
    assert record["first_step"] == 6
    assert record["losses"] == pytest.approx(whole["losses"][6:], rel=TOLERANCE)


def test_sharded_checkpoints_that_are_not_resumed(base, tmp_path):
    model = loading.attach_lora(base, SHORT)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-3)
    with pytest.raises(CheckpointError, match="holds no complete sharded checkpoint: train without --resume"):
        sharding.load_sharded(model, optimizer, "mine", tmp_path / "none")
    folder = sharding.save_sharded(model, optimizer, 1, "mine", tmp_path / "some")
    with pytest.raises(CheckpointError, match="belongs to a run with another profile, seed or data"):
        sharding.load_sharded(model, optimizer, "other", folder)
    shard = next(folder.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="holds no complete"):
        sharding.load_sharded(model, optimizer, "mine", folder)


def test_what_is_not_sharded_is_told(base, monkeypatch, tmp_path):
    with pytest.raises(NotShardedError, match="27 of 27 parameters are whole in every process"):
        sharding.prove_sharded(base)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # shards nothing on a CPU, and says nothing
    with pytest.raises(NotShardedError, match="start helpers.sharding"):
        training.run(SHORT, output=tmp_path / "run", scoring=False)


def test_float16_has_no_loss_scaling_here(tmp_path):
    with pytest.raises(ProfileError, match="computes in float16 and helpers.sharding has no loss scaling"):
        sharding.run(profiles.PROFILES["colab-t4"], tmp_path)


def test_packing_as_floats_changes_no_bit(base):
    before = loading.base_fingerprint(base)
    sharding.pack_as_floats(base)
    assert loading.base_fingerprint(base) == sharding.whole_fingerprint(base) == before
    assert {layer.weight.dtype for layer in loading.four_bit_layers(base).values()} == {torch.float32}


# --- accelerate's configuration ---------------------------------------------------------------------------------------------


def parsed(path: Path, count: int):
    """What `accelerate launch` makes of a file: its arguments and the environment of the processes."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "--num_processes", str(count), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    return arguments, prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_accelerate_reads_the_configurations(count):
    assert load_config_from_file(str(DDP)).distributed_type == "MULTI_GPU"
    arguments, environment = parsed(DDP, count)
    assert arguments.multi_gpu and arguments.num_processes == count and not arguments.use_fsdp
    assert "ACCELERATE_USE_FSDP" not in environment
    arguments, environment = parsed(FSDP2, count)
    assert arguments.use_fsdp and arguments.num_processes == count and arguments.mixed_precision == "bf16"
    with patch_environment(**environment):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == ["FalconDecoderLayer"]
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT" and not plugin.cpu_ram_efficient_loading


# --- the planner ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", memory.METHODS)
@pytest.mark.parametrize("model", [profiles.FALCON_7B, memory.FALCON_11B, memory.FALCON_40B, memory.FALCON_180B])
def test_plans_for_more_cards(model, method):
    config, profile = memory.known_config(model), memory.gpu_profile(model, "A100-80GB", 1, 512)
    one = memory.plan(config, profile, method)
    assert scaling.card_plan(config, profile, method, 1, "ddp") == scaling.card_plan(config, profile, method, 1, "fsdp") == one
    assert scaling.card_plan(config, profile, method, 8, "ddp").total == one.total + one.gradients
    totals = [scaling.card_plan(config, profile, method, cards, "fsdp").total for cards in (2, 4, 8, 1024)]
    assert totals == sorted(totals, reverse=True)
    last = scaling.card_plan(config, profile, method, 1024, "fsdp")
    assert last.activations == one.activations and last.logits == one.logits and last.constants == one.constants


def test_sizes_are_those_of_the_names():
    billions = {
        model: round(sum(memory.count_parameters(memory.known_config(model)).values()) / 1e9)
        for model in (memory.FALCON_11B, memory.FALCON_180B)
    }
    assert billions == {memory.FALCON_11B: 11, memory.FALCON_180B: 179}


def test_bad_plans():
    config, profile = memory.known_config(profiles.FALCON_7B), memory.gpu_profile(profiles.FALCON_7B, "T4", 1, 512)
    with pytest.raises(PlanError, match="no strategy 'zero' in this planner: choose one of ddp, fsdp"):
        scaling.card_plan(config, profile, "qlora", 2, "zero")
    with pytest.raises(PlanError, match="0 cards cannot be planned for"):
        scaling.card_plan(config, profile, "qlora", 0, "fsdp")
    with pytest.raises(PlanError, match="tokens a second of 0 give no time"):
        scaling.hours(1e6, 0)
    assert scaling.hours(3.6e6, 100, cards=2, efficiency=0.5) == 10
