"""The main job: its numbers, equal to the notebook's; killed and interrupted runs that end where undisturbed ones do."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import checkpoints
from helpers.profiles import ROOT

KEYS = {
    "profile", "model", "revision", "seed", "versions", "parameters_total", "parameters_trainable", "linear4bit_modules", "footprint_bytes",
    "footprint_expected_bytes", "before", "after", "after_reworded", "perplexity_before", "train_seconds", "total_seconds", "steps", "final_loss",
    "useful_tokens_per_second", "peak_rss_bytes", "adapter_dir",
}  # fmt: skip
# What one machine's speed or memory decides, and nothing else does
MACHINE = {"train_seconds", "total_seconds", "useful_tokens_per_second", "peak_rss_bytes", "adapter_dir"}


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    """results.json of `python -m helpers.training`, the command behind `make finetune`, and its folder."""
    folder = tmp_path_factory.mktemp("main-job")
    subprocess.run([sys.executable, "-m", "helpers.training", "--profile", "tiny", "--output", str(folder)], cwd=ROOT, check=True)
    return json.loads((folder / "results.json").read_text()), folder


def test_main_job_reaches_its_figures(main_job):
    record, folder = main_job
    assert set(record) == KEYS
    assert record["before"]["exact_match"] <= 0.02
    assert record["after"]["valid_json"] >= 0.99
    assert record["after"]["exact_match"] >= 0.97
    assert record["after_reworded"]["exact_match"] >= 0.50
    assert record["linear4bit_modules"] == 16
    assert abs(record["footprint_bytes"] / record["footprint_expected_bytes"] - 1) < 0.005
    assert record["peak_rss_bytes"] <= 2e9
    assert sorted(p.name for p in (folder / "adapter").iterdir() if p.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.sha256",
    ]


def test_main_job_and_notebook_give_the_same_result(main_job):
    record, folder = main_job
    notebook = ROOT / "runs" / "tiny-notebook"
    assert (notebook / "results.json").exists(), "notebook 05 has not run: `make test` runs it before the tests"
    shown = json.loads((notebook / "results.json").read_text())
    assert {k: v for k, v in record.items() if k not in MACHINE} == {k: v for k, v in shown.items() if k not in MACHINE}
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (notebook / weights).read_bytes()


SHORT_RUN = """
import sys
from dataclasses import replace
from helpers import profiles, training
profiles.PROFILES["tiny"] = replace(profiles.PROFILES["tiny"], max_steps=40, save_steps=10, micro_batch=8, max_new_tokens=8)
sys.exit(training.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def short_data(tmp_path_factory):
    """100 tickets: enough for a run of a few seconds."""
    path = tmp_path_factory.mktemp("data") / "short.jsonl"
    lines = (ROOT / "data" / "tickets" / "train.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:100]))
    return path


def start(data, output, *more) -> subprocess.Popen:
    arguments = ["--data", str(data), "--prompt-column", "message", "--answer-column", "ticket", "--output", str(output), *more]
    return subprocess.Popen(
        [sys.executable, "-c", SHORT_RUN, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def undisturbed(short_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(short_data, folder))
    return folder


def wait_for_checkpoint(process, output, step: int) -> None:
    deadline = time.monotonic() + 240
    while not (output / "checkpoints" / f"checkpoint-{step}" / checkpoints.MARKER).exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def same_end(a, b) -> None:
    """Equal losses at every step, equal adapters, equal scores."""
    histories = [
        json.loads((f / "checkpoints" / "checkpoint-40" / "trainer_state.json").read_text())["log_history"] for f in (a, b)
    ]
    losses = [[(entry["step"], entry["loss"]) for entry in history if "loss" in entry] for history in histories]
    assert losses[0] == losses[1]
    weights = [(f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (a, b)]
    assert weights[0] == weights[1]
    records = [json.loads((f / "results.json").read_text()) for f in (a, b)]
    assert all(records[0][key] == records[1][key] for key in ("after", "final_loss", "steps"))


def test_killed_and_resumed_ends_as_undisturbed(short_data, undisturbed, tmp_path):
    process = start(short_data, tmp_path)
    wait_for_checkpoint(process, tmp_path, 10)
    process.kill()
    process.communicate()
    assert not (tmp_path / "results.json").exists()
    out, _ = finish(start(short_data, tmp_path, "--resume"))
    assert "resuming from checkpoint-" in out
    same_end(tmp_path, undisturbed)


def test_interrupted_leaves_a_sound_checkpoint_and_says_how_to_go_on(short_data, undisturbed, tmp_path):
    process = start(short_data, tmp_path)
    wait_for_checkpoint(process, tmp_path, 10)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "its checkpoint is saved, run again with --resume" in err
    assert "Traceback" not in err
    folders = sorted((tmp_path / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert checkpoints.is_sound(folders[-1])
    finish(start(short_data, tmp_path, "--resume"))
    same_end(tmp_path, undisturbed)


def test_resume_without_a_sound_checkpoint_starts_anew(short_data, undisturbed, tmp_path):
    damaged = tmp_path / "checkpoints" / "checkpoint-30"
    damaged.mkdir(parents=True)
    (damaged / "trainer_state.json").write_text('{"half": ')
    out, _ = finish(start(short_data, tmp_path, "--resume"))
    assert "no sound checkpoint found: starting at step 0" in out
    same_end(tmp_path, undisturbed)


def test_help_names_every_profile():
    out = subprocess.run(
        [sys.executable, "-m", "helpers.training", "--help"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert "colab-t4" in out
    assert subprocess.run([sys.executable, "-m", "helpers.training", "--nonsense"], cwd=ROOT, capture_output=True).returncode == 2
