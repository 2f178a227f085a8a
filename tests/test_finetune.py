"""The command line's run: its figures; killed and interrupted runs end as undisturbed ones."""

import contextlib
import dataclasses
import gc
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from helpers import checkpoints, loading, profiles, prompting, records, training
from helpers.environment import ROOT
from helpers.errors import TutorialError
from tests.notebooks import python

SHORT = dataclasses.replace(profiles.PROFILES["tiny"], max_steps=6, save_steps=2, micro_batch=4)


def test_main_job_reaches_its_figures(main_job):
    """`main_job` (conftest.py): results.json of `make finetune`'s command, run once a test run."""
    record, folder = main_job
    assert record["before"]["exact_match"] <= 0.02 and record["after"]["valid_json"] >= 0.99
    assert record["after"]["exact_match"] >= 0.98 and record["peak_rss_bytes"] <= 2e9
    assert record["after_reworded"]["exact_match"] >= 0.92 and record["linear4bit_modules"] == 16
    assert record["footprint_bytes"] == record["footprint_expected_bytes"]
    first, *_, last = record["validation_losses"]
    assert len(record["validation_losses"]) == 4 and last < min(0.003, 0.35 * first)
    card = (folder / "adapter" / "README.md").read_text()
    assert f"validation loss {last:.4f}".rstrip("0") in card
    assert f"exact match | {record['after']['exact_match']:.3f}" in card
    assert "FalconLinear = torch.nn.Linear" in card and "base_model:" not in card  # a folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 tickets, some of them twice, as a reader's own file."""
    path = tmp_path_factory.mktemp("data") / "short.jsonl"
    lines = (records.TICKETS / "train.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:60] + lines[:9]))
    return path


def words(data, output, *more) -> list[str]:
    options = "--prompt-column message --answer-column ticket --no-scoring --learning-rate 1e-3"
    options += f" --seed 3 --steps 12 --save-steps 3 --data {data} --output {output}"
    return [*options.split(), *more]


def run(*arguments) -> str:
    """What a whole run prints. It has this process, which has imported all that it needs."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert training.main(words(*arguments)) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert "no sound checkpoint: starting anew" in run(data, folder, "--resume")
    return folder


def start_and_save(data, output) -> subprocess.Popen:
    """A run that has its first checkpoint and goes on."""
    command = [sys.executable, "-m", "helpers.training", *words(data, output)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process, deadline = subprocess.Popen(command, cwd=ROOT, **pipes), time.monotonic() + 240
    while not (output / "checkpoints" / "checkpoint-3" / checkpoints.MARKER).exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def same_end(a, b) -> None:
    """Equal losses at every one of 12 steps, training and validation, and equal adapters."""
    state = "checkpoints/checkpoint-12/trainer_state.json"
    logs = [json.loads((folder / state).read_text())["log_history"] for folder in (a, b)]
    losses = [[(e["step"], e.get("loss"), e.get("eval_loss")) for e in log] for log in logs]
    assert losses[0] == losses[1] and any(loss[2] for loss in losses[0])
    name = "adapter/adapter_model.safetensors"
    assert (a / name).read_bytes() == (b / name).read_bytes()


def test_notebook_05s_recipe_ends_as_the_command_line(data, undisturbed, tmp_path):
    training.write_recipe(tmp_path / "recipe.py")
    script = (tmp_path / "recipe.py").read_text()
    form = {"DATA": str(data), "STEPS": 12, "SEED": 3, "LEARNING_RATE": 1e-3, "OUTPUT": "out"}
    for name, value in form.items():
        script = re.sub(rf"(?m)^{name} = .*$", f"{name} = {value!r}", script, count=1)
    (tmp_path / "recipe.py").write_text(script)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    outside = os.pathsep.join(path for path in paths if Path(path).name == "guard")
    python("recipe.py", cwd=tmp_path, env=os.environ | {"PYTHONPATH": outside}, check=True)
    same_end(tmp_path / "out", undisturbed)


def test_killed_and_resumed_ends_as_undisturbed(data, undisturbed, tmp_path, capsys):
    process = start_and_save(data, tmp_path)
    process.kill()
    process.communicate()
    assert not (tmp_path / "results.json").exists()
    (half := tmp_path / "checkpoints" / "checkpoint-11").mkdir()  # as a kill while saving leaves it
    (half / "trainer_state.json").write_text('{"half": ')
    assert training.main(words(data, tmp_path)) == 1
    assert "is unfinished: go on with --resume" in capsys.readouterr().err
    done = python("-m", "helpers.training", *words(data, tmp_path, "--resume"), check=True)
    assert "resuming from checkpoint-" in done.stdout
    assert not half.exists()
    same_end(tmp_path, undisturbed)


def test_interrupted_saves_first_and_says_how_to_go_on(data, undisturbed, tmp_path):
    process = start_and_save(data, tmp_path)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
    assert "its checkpoint is saved, run again with --resume" in err
    step = int(err.split("stopped at step ")[1].split()[0])
    assert checkpoints.is_sound(tmp_path / "checkpoints" / f"checkpoint-{step}")
    run(data, tmp_path, "--resume", "--save-steps", "11")
    assert len(list(tmp_path.glob("checkpoints/checkpoint-1[12]"))) == 2
    same_end(tmp_path, undisturbed)


def test_one_run_at_a_time_in_a_folder(tmp_path, capsys):
    command = ["--output", str(tmp_path), "--steps", "1", "--no-scoring"]
    with (hold := checkpoints.only_run_in)(tmp_path), hold(tmp_path), ThreadPoolExecutor() as pool:
        assert pool.submit(training.main, command).result() == 1  # another stands for a process
    assert "".join(capsys.readouterr()).startswith("TutorialError: another run trains in")
    (tmp_path / "adapter" / "source").mkdir(parents=True)  # a reader's own
    assert training.main(command) == 1 and "is no adapter" in capsys.readouterr().err


def test_a_trained_model_can_be_freed(tiny, tokenizer, encoded, tmp_path):
    """bitsandbytes remembers the embedding of each model that it optimizes in 8 bits."""
    model = loading.attach_lora(loading.load_base(tiny), tiny)
    embedding = weakref.ref(model.get_input_embeddings())
    short = dataclasses.replace(tiny, max_steps=1)
    training.fine_tune(model, tokenizer, encoded, short, tmp_path)
    del model
    gc.collect()
    assert embedding() is None


def test_a_checkpoint_of_another_run_is_not_taken(data, undisturbed, capsys):
    assert training.main(words(data, undisturbed, "--resume", "--seed", "1")) == 1
    assert "run (seed 3, now 1; the training rows): repeat" in capsys.readouterr().err


def test_a_checkpoint_past_the_steps_of_the_run_is_told(tokenizer, encoded, tmp_path):
    (folder := tmp_path / "checkpoints" / "checkpoint-7").mkdir(parents=True)
    same = dataclasses.replace(SHORT, eval_batch=1)  # which decides nothing that is trained
    checkpoints.mark_complete(folder, checkpoints.run_identity(same, encoded, 0))
    with pytest.raises(TutorialError, match=r"checkpoint-7 .* \(this one ends at step 6\): repeat"):
        training.fine_tune(None, tokenizer, encoded, SHORT, tmp_path, resume=True)


def test_a_checkpoint_is_sound_only_whole(tmp_path):
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "weights").write_bytes(b"12345")
    assert checkpoints.newest_checkpoint(tmp_path, {}, 5) is None  # as if the save was cut off
    checkpoints.mark_complete(folder, {})
    assert checkpoints.newest_checkpoint(tmp_path, {}, 5) == folder
    (folder / "weights").write_bytes(b"1234")
    assert checkpoints.newest_checkpoint(tmp_path, {}, 5) is None


@pytest.fixture(scope="module")
def encoded():
    tokenizer = loading.load_tokenizer(SHORT)
    return prompting.encode(records.read_tickets("validation"), tokenizer, SHORT.max_length)[0]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_and_inf_are_not_saved(base, tokenizer, encoded, tmp_path, monkeypatch, where):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            last = [p for p in model.parameters() if p.requires_grad][-1]
            if state.global_step == 3 and where == "loss":
                last.data.fill_(math.nan)
            elif state.global_step == 3:
                last.register_hook(lambda gradient: gradient * math.inf)

    monkeypatch.setattr(checkpoints, "Progress", lambda: spoil)
    spoil = Spoil()
    spoil.close = lambda: None
    model = loading.attach_lora(base, SHORT)
    with pytest.raises(TutorialError, match=r"step 4 is .*: lower the learning rate \(0.00"):
        training.fine_tune(model, tokenizer, encoded, SHORT, tmp_path)
    kept = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert kept == ["checkpoint-2"] and checkpoints.is_sound(tmp_path / "checkpoints" / kept[0])


def test_a_malicious_checkpoint_does_not_run(tiny, tokenizer, encoded, tmp_path):
    """Somebody swaps a pickled file and marks the checkpoint complete again: nothing runs."""

    class Malicious:
        def __reduce__(self):
            return open, (str(trap), "w")

    def train(resume=False):
        model = loading.attach_lora(loading.load_base(SHORT), SHORT)
        training.fine_tune(model, tokenizer, encoded, SHORT, tmp_path, resume=resume)

    train()
    newest, trap = tmp_path / "checkpoints" / "checkpoint-4", tmp_path / "executed"
    (tmp_path / "checkpoints" / "checkpoint-6" / checkpoints.MARKER).unlink()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        sound = (newest / name).read_bytes()
        torch.save(Malicious(), newest / name)
        checkpoints.mark_complete(newest, checkpoints.run_identity(SHORT, encoded, 0))
        with pytest.raises(Exception, match="(?i)weights.only|unpickl"):
            train(resume=True)
        assert not trap.exists(), name
        (newest / name).write_bytes(sound)


BAD_OPTIONS = [
    ("--steps 0", 2, "'0' is not a whole number from 1"),
    ("--seed -1", 2, "'-1' is not a whole number|expected one argument"),
    ("--data=", 1, "DataError: '.' is a folder: name a file"),
    ("--write-recipe README.md", 1, "'README.md' is there already: name a new file"),
    ("--profile nope", 1, "TutorialError: there is no profile 'nope': choose auto or tiny"),
    ("--profile colab-t4", 1, "profile 'colab-t4' needs a GPU and none was found"),
    ("--split test", 2, "are of --data: name it"),
    ("--write-recipe r.py --seed 1", 2, "takes no other option"),
    ("--output /proc/nowhere", 1, "'/proc/nowhere/.*' could not be written .*: choose another"),
]


@pytest.mark.parametrize(("options", "status", "words"), BAD_OPTIONS)
def test_bad_options_are_told_in_one_sentence(options, status, words, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load_base", lambda *a: pytest.fail("the base was loaded first"))
    try:
        found = training.main(options.split())
    except SystemExit as stop:
        found = stop.code
    err = capsys.readouterr().err
    assert found == status and "Traceback" not in err and re.search(words, err), err


def test_in_float16_a_run_whose_gradients_are_never_finite_is_stopped():
    args = SimpleNamespace(fp16=True, learning_rate=1.0, warmup_steps=0)
    stop, state = checkpoints.StopOnDivergence(), SimpleNamespace(global_step=1)
    for norm in [*[math.inf] * 24, 1.0, *[math.inf] * 24]:  # loss scaling skips such steps
        stop.on_log(args, state, None, {"loss": 1.0, "grad_norm": norm})
    with pytest.raises(TutorialError, match="loss at step 1 is nan"):  # an evaluation's
        stop.on_log(args, state, None, {"eval_loss": math.nan})
    with pytest.raises(TutorialError, match="or take a card with bfloat16"):
        stop.on_log(args, state, None, {"loss": 1.0, "grad_norm": math.inf})
