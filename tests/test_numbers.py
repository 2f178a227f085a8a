"""Numbers that go wrong in training, on the real tiny Falcon: each is told while it runs, and the last sound checkpoint stays."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from helpers import checkpoints, divergence, loading, profiles, prompting, records, training
from helpers.errors import DataError, DivergedError, ProfileError
from tests.notebooks import ROOT

SHORT = dataclasses.replace(profiles.PROFILES["tiny"], max_steps=40, save_steps=4, micro_batch=4, warmup_steps=2)


@pytest.fixture(scope="module")
def encoded():
    tokenizer = loading.load_tokenizer(SHORT)
    return prompting.encode(records.read_tickets("validation"), tokenizer, SHORT.max_length)[0]


class Spoil(TrainerCallback):
    """After `step`, does something to the model."""

    def __init__(self, step: int, spoil):
        self.step, self.spoil = step, spoil

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.spoil(model)


def trained(folder, base, tokenizer, encoded, spoil=None, **changes) -> dict:
    """A short run; `spoil` is (step, what to do to the model after it)."""
    profile = dataclasses.replace(SHORT, **changes)
    trainer = training.build_trainer(loading.attach_lora(base, profile), tokenizer, encoded, profile, folder)
    if spoil:
        trainer.add_callback(Spoil(*spoil))
    return training.train(trainer)


def sound_steps(folder) -> list[int]:
    kept = [path for path in (folder / "checkpoints").glob("checkpoint-*") if checkpoints.is_sound(path)]
    assert all(path.is_dir() for path in kept) and not list((folder / "checkpoints").glob("*.part"))
    return sorted(int(path.name.split("-")[1]) for path in kept)


def adapter_weights(model) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fill(value: float):
    """Sets the last trained matrix to `value`: the loss is no number from then on."""

    def spoil(model):
        with torch.no_grad():
            adapter_weights(model)[-1].fill_(value)

    return spoil


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_its_checkpoint(base, tokenizer, encoded, tmp_path, value):
    with pytest.raises(DivergedError, match=r"the loss at step 8 is (nan|inf): lower the learning rate \(0.002\), or lengthen the warm-up \(2 steps\)"):  # fmt: skip
        trained(tmp_path, base, tokenizer, encoded, (7, fill(value)))
    assert sound_steps(tmp_path) == [4]


def test_gradients_that_are_no_numbers_stop_before_they_are_saved(base, tokenizer, encoded, tmp_path):
    """The loss of step 8 is sound, its gradients are not: with the loss alone, checkpoint-8 would hold weights that are no numbers."""

    def spoil(model):
        adapter_weights(model)[-1].register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(
        DivergedError, match=r"the gradients at step 8 have the norm (nan|inf): lower the learning rate \(0.002\)"
    ):
        trained(tmp_path, base, tokenizer, encoded, (7, spoil))
    assert sound_steps(tmp_path) == [4]


def test_gradients_that_explode_are_told(base, tokenizer, encoded, tmp_path):
    def spoil(model):
        for weight in adapter_weights(model):
            weight.register_hook(lambda gradient: gradient * 1e6)

    with pytest.raises(
        DivergedError, match=r"the gradients have a norm of .*e\+0. over 10 steps \(step 1\d\): lower the learning rate"
    ):
        trained(tmp_path, base, tokenizer, encoded, (4, spoil))
    assert sound_steps(tmp_path)


@pytest.mark.parametrize("rate", [0.1, 1.0, 30.0, 1000.0])
def test_a_learning_rate_that_diverges_is_told(base, tokenizer, encoded, tmp_path, rate):
    with pytest.raises(
        DivergedError,
        match=rf"(the gradients have vanished .* and the loss has not .*|the loss at step \d+ is nan): lower the learning rate \({rate:g}\), or lengthen the warm-up",
    ):
        trained(tmp_path, base, tokenizer, encoded, learning_rate=rate, save_steps=2)
    assert sound_steps(tmp_path)


@pytest.mark.parametrize("rate", [2e-4, 2e-3, 2e-2])
def test_a_learning_rate_that_learns_is_left_alone(base, tokenizer, encoded, tmp_path, rate):
    assert trained(tmp_path, base, tokenizer, encoded, learning_rate=rate)["steps"] == SHORT.max_steps


def watch(losses: list[float], **entry) -> divergence.StopOnDivergence:
    """The watcher after a run with these losses."""
    watcher = divergence.StopOnDivergence()
    arguments = SimpleNamespace(fp16=entry.pop("fp16", False), learning_rate=2e-4, warmup_steps=20)
    watcher.on_train_begin(arguments, SimpleNamespace(log_history=[]), None)
    for step, loss in enumerate(losses, start=1):
        watcher.on_log(arguments, SimpleNamespace(global_step=step), None, {"loss": loss} | entry)
    return watcher


def test_a_course_that_goes_well_raises_no_alarm():
    for layout in json.loads((ROOT / "data" / "rehearsal_7b.json").read_text())["layouts"].values():
        watch(layout["phases"]["resume"]["losses"])
    watch([3.0, 2.9, 3.3, 2.7] * 5 + [0.5, 0.1, 0.9, 0.2] * 20)  # batches differ
    watch([0.2] * 30 + [9.0] * 4 + [0.2] * 30)  # a few hard batches
    watch([0.02] * 30 + [0.9] * 30)  # fifty times the loss, and less than a nat


@pytest.mark.parametrize(
    ("losses", "step"),
    [([0.3] * 50 + [6.0] * 20, 55), ([3.0] * 4 + [11.0] * 30, 13), ([3.0] * 20 + [0.1] * 50 + [2.5] * 20, 75)],
    ids=["late", "in the warm-up", "forgets what it learnt"],
)
def test_a_rise_is_told_within_a_window(losses, step):
    with pytest.raises(DivergedError, match=rf"rose from .* to .* \(step {step}\): lower the learning rate \(0.0002\), or lengthen the warm-up \(20 steps\); only checkpoints from before"):  # fmt: skip
        watch(losses)


def test_a_resumed_run_remembers_what_it_had_learnt():
    watcher, arguments = divergence.StopOnDivergence(), SimpleNamespace(fp16=False, learning_rate=2e-4, warmup_steps=20)
    history = [{"loss": 0.1, "step": step} for step in range(1, 31)]
    watcher.on_train_begin(arguments, SimpleNamespace(log_history=history), None)

    def blow_up():
        for step in range(31, 45):
            watcher.on_log(arguments, SimpleNamespace(global_step=step), None, {"loss": 8.0})

    with pytest.raises(DivergedError, match=r"rose from 0.1 \(steps to "):
        blow_up()


def test_float16_skips_steps_without_alarm_but_not_for_ever():
    """GradScaler starts at 65,536 and halves until the gradients are finite: infinite norms at the start of a run are no divergence."""
    watch([3.0] * 20, grad_norm=math.inf, fp16=True)
    with pytest.raises(DivergedError, match="the gradients at step 25 have the norm inf: .* or take a card with bfloat16"):
        watch([3.0] * 30, grad_norm=math.inf, fp16=True)


# --- labels and answers -------------------------------------------------------------------------------------------------------


def masked(encoded, indices):
    """`encoded` with every label of the examples at `indices` ignored."""
    return encoded.map(
        lambda row, i: {"labels": [prompting.IGNORED] * len(row["labels"])} if i in indices else row, with_indices=True
    )


def test_examples_without_a_label_are_counted_before_training(base, tokenizer, encoded, tmp_path):
    profile = SHORT
    model = loading.attach_lora(base, profile)
    with pytest.raises(DataError, match=r"every label of 3 of 200 examples is -100, the first of them example 5: .* keep the answer's labels"):  # fmt: skip
        training.build_trainer(model, tokenizer, masked(encoded, {5, 6, 90}), profile, tmp_path)


def test_a_batch_without_a_label_is_told_in_training(base, tokenizer, encoded, tmp_path):
    """A data set that was changed after the trainer was built: the collator sees it, before a mean over nothing is a nan."""
    profile = dataclasses.replace(SHORT, save_steps=2)
    trainer = training.build_trainer(loading.attach_lora(base, profile), tokenizer, encoded, profile, tmp_path)
    trainer.train_dataset = masked(trainer.train_dataset, range(12, 16))  # of step 4
    with pytest.raises(
        DataError, match="every label of a batch of 4 examples is -100: its loss is a mean over nothing, keep the labels"
    ):
        training.train(trainer)
    assert sound_steps(tmp_path) == [2]


def test_a_label_on_the_first_token_alone_teaches_nothing(encoded):
    row = encoded[0] | {"labels": [encoded[0]["input_ids"][0]] + [prompting.IGNORED] * (len(encoded[0]["labels"]) - 1)}
    with pytest.raises(DataError, match="every label of a batch of 1 examples is -100"):
        prompting.Collator(0)([row])


@pytest.mark.parametrize("answer", ["", "  ", "\n"])
def test_an_answer_of_no_length_is_not_learnt(tokenizer, answer):
    rows = records.Dataset.from_list([{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": answer}])
    with pytest.raises(DataError, match="row 2: the answer is '.*', of no length: give an answer, or remove the row"):
        prompting.encode(rows, tokenizer, 128)


def test_answers_that_come_out_empty_are_counted(tmp_path, capsys, monkeypatch):
    """A model that has learnt to end at once: the run says so, with the number, under its table."""
    real = prompting.generate
    monkeypatch.setattr(
        prompting, "generate", lambda model, tokenizer, prompts, *rest: real(model, tokenizer, prompts[:6], *rest)[:4] + [""] * (len(prompts) - 4)
    )  # fmt: skip
    profile = dataclasses.replace(SHORT, max_steps=1, save_steps=1, max_new_tokens=4)
    training.run(profile, output=tmp_path)
    assert "296 of 300 answers are empty: the model ends at once" in capsys.readouterr().out


SETTINGS = [
    *(("learning_rate", value, "a finite number above 0") for value in (0, 0.0, -1e-3, math.nan, math.inf, "2e-4", None)),
    *(("max_steps", value, "a whole number of at least 1") for value in (0, -1, 1.5, math.nan, True)),
    *((name, 0, "a whole number of at least 1") for name in ("micro_batch", "accumulation", "save_steps", "eval_batch", "max_new_tokens", "lora_r")),
    ("max_length", 1, "a whole number of at least 2"),
    ("warmup_steps", -1, "a whole number of at least 0"),
    ("lora_alpha", 0, "a finite number above 0"),
    ("compute_dtype", "bf16", "one of bfloat16, float16, float32"),
    ("target_modules", (), "at least one of query_key_value"),
    ("target_modules", ("q_proj",), "at least one of query_key_value"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "wanted"), SETTINGS, ids=lambda value: str(value)[:20])
def test_settings_that_cannot_be_are_refused_before_anything_is_loaded(name, value, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_config", lambda profile: pytest.fail("a config was read first"))
    profile = dataclasses.replace(SHORT, **{name: value})
    told = rf"{name} of profile 'tiny' (is|are) .*{re.escape(str(value)[:4])}.*: give {wanted}"
    for refuse in (loading.load_base, lambda p: training.run(p, output=tmp_path / "run")):
        with pytest.raises(ProfileError, match=told):
            refuse(profile)
    assert not (tmp_path / "run").exists()
