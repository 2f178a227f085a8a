"""The study of notebook 07: its plan, its file, its scores, and runs that repeat stored rows."""

import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from data.study import build as script
from data.study import plan as planning
from data.study import skew, study
from data.study.plan import EXPERIMENTS, GRID, missing, plan
from data.study.study import Run
from helpers import loading
from helpers.errors import DataError

TINY_RUN = Run("methods", "lora", "nf4+dq", "all", 16, 2400, 1e-3, 0)


@pytest.fixture(scope="module")
def stored():
    return script.read(study.FILE)


def test_the_file_holds_the_plan_and_nothing_else(stored, capsys):
    found = study.runs(stored)
    assert len(set(found)) == len(found)
    assert set(found) == {run for name in EXPERIMENTS for run in plan(name, stored)}
    assert script.main(["--experiment", "methods"]) == 0
    assert "methods: 35 runs are there, 0 to go" in capsys.readouterr().out


def test_the_grid_has_seeds_of_its_own_and_equal_parameters_are_equal(stored):
    grid = set(stored[stored.experiment == "grid"].seed)
    assert not grid & set(stored[stored.experiment != "grid"].seed)  # it cannot choose by luck
    for targets, rank in planning.EQUAL_PARAMETERS.items():
        part = stored[(stored.targets == targets) & (stored["rank"] == rank)]
        assert set(part.trainable) == {122_880}, targets


def test_what_is_compared_is_tuned_on_one_grid(stored):
    for settings in planning.TUNED:
        rates = set(planning.grid_means(stored, settings).index)
        at_the_edge = planning.best_learning_rate(stored, settings) == GRID[-1]
        assert rates == set(planning.grid_rates(stored, settings)) >= set(GRID)
        assert planning.WIDER in rates or not at_the_edge  # the edge is no optimum
    with pytest.raises(DataError, match="the grid lacks runs of .*fp32"):
        plan("methods", stored[:0])


def test_a_run_that_cannot_be_is_refused():
    wrong = {"method": "lorra", "format": "int8", "data": "poems", "targets": "norms"}
    for name, value in wrong.items():
        with pytest.raises(DataError, match=str(value)):
            replace(TINY_RUN, **{name: value})


def row(seed: int) -> dict:
    measured = {"trainable": 5, "bytes": 7, "test_exact": 0.5, "seconds": 1.5}
    return asdict(replace(TINY_RUN, seed=seed)) | measured | dict.fromkeys(script.VERSIONS, "1.0.0")


@pytest.fixture
def file(tmp_path):
    for seed in range(3):
        script.append(tmp_path / "study.csv", row(seed))
    return tmp_path / "study.csv"


@pytest.mark.parametrize(("cut", "left"), [(1, 2), (5, 2), (40, 2), (-500, 0), (-300, 0)])
def test_a_line_cut_off_is_removed_and_no_complete_row_is_lost(file, cut, left, capsys):
    file.write_bytes(file.read_bytes()[:-cut])
    found = script.read(file)
    assert study.runs(found) == [replace(TINY_RUN, seed=seed) for seed in range(left)]
    assert list(found.test_exact) == [0.5] * left and found.steps_to_90.isna().all()
    assert "study.csv: a line without its end is removed" in capsys.readouterr().err
    script.append(file, row(7))
    assert list(script.read(file).seed)[left:] == [7]


def test_a_damaged_file_is_refused_and_left_alone(file, capsys):
    damaged = file.read_text().replace("method", "metod", 1)
    file.write_text(damaged)
    assert script.main(["--file", str(file)]) == 1
    assert "study.csv is no study file" in capsys.readouterr().err and file.read_text() == damaged


def test_int4_rounds_to_15_values_a_block():
    models = [study.load_format(name) for name in ("fp32", "int4")]
    a, b = (m.transformer.h[1].mlp.dense_h_to_4h.weight.view(-1, 64) for m in models)
    step = a.abs().amax(1, keepdim=True) / 7
    torch.testing.assert_close(b, (a / step).round().clamp(-7, 7) * step)


def test_a_gpu_leaves_4bit_models_where_their_rows_are(monkeypatch):
    monkeypatch.setattr(
        Bnb4BitHfQuantizer, "update_device_map", lambda self, found: found or {"": "meta"}
    )
    assert {p.device.type for p in study.load_format("nf4").parameters()} == {"cpu"}


def test_bytes_while_training_are_those_of_the_real_model():
    model = study.prepare(TINY_RUN)
    frozen = [p for name, p in model.named_parameters() if "lora_" not in name]
    # float32 is what the rest is held in here; a 16-bit base has it in two bytes
    held = sum(2 * p.numel() if p.is_floating_point() else p.nbytes for p in frozen)
    for layer in loading.four_bit_layers(model).values():
        constants = layer.weight.quant_state
        held += constants.absmax.nbytes + constants.state2.absmax.nbytes + 4
    held += 16 * model.num_parameters(only_trainable=True)
    assert script.training_bytes(model, TINY_RUN) == pytest.approx(held, rel=1e-3)


def test_skewed_rows_are_skewed_as_they_say():
    high = skew.urgency_tokens()[skew.HIGH]
    pairs = zip(study.encoded("train"), skew.train_tickets(), strict=True)
    tickets = {tuple(row["input_ids"][:-3]): ticket for row, ticket in pairs}
    for data, least, most in (("skewed-labels", 0.85, 0.95), ("rebalanced", 0.05, 0.15)):
        labels = []
        for found in skew.training_rows(replace(TINY_RUN, data=data)):
            ticket = tickets[tuple(found["input_ids"][:-3])]
            if ticket["product"] in skew.products()[0] and ticket["urgency"] == "normal":
                labels.append(found["labels"][-3])
        assert least < labels.count(high) / len(labels) < most, data
    with pytest.raises(DataError, match="rows of 'rebalanced' are made by data/study/skew.py"):
        study.training_rows(replace(TINY_RUN, data="rebalanced"))


def test_a_pair_differs_in_the_product_alone():
    for pair in list(zip(*skew.message_pairs(), strict=True))[:20]:
        a, b = (study.tokenizer().decode(row["input_ids"]) for row in pair)
        product = next(name for name in skew.products()[0] if name in a)
        parts = a.split(product)  # it stands in the message and in the ticket
        assert len(parts) == 3 and product not in b and all(part in b for part in parts)


def test_intervals():
    for degrees, value in ((1, 12.706), (2, 4.303), (4, 2.776), (30, 2.042)):  # any table of t
        assert study.t_quantile(degrees) == pytest.approx(value, abs=6e-4)
    assert study.mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5), abs=1e-3)
    with pytest.raises(DataError, match="an interval needs 2 values and has 1"):
        study.mean_interval([1.0])


def test_killed_and_started_again_it_repeats_the_stored_rows(tmp_path, stored):
    file = tmp_path / "study.csv"
    grid = stored[stored.experiment == "grid"]
    grid.to_csv(file, index=False)
    command = [sys.executable, script.__file__, "--experiment", "recovers", "--file", str(file)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **quiet)
    while file.read_bytes().count(b"\n") == len(grid) + 1 and started.poll() is None:
        time.sleep(0.5)
    started.kill()
    started.wait()
    rows = script.read(file)
    both = rows[len(grid) :].merge(stored, on=list(Run.__annotations__), suffixes=("", "_stored"))
    assert len(missing("recovers", rows)) == len(plan("recovers", stored)) - len(both) < 25
    assert list(both.perplexity) == pytest.approx(list(both.perplexity_stored), rel=2e-3)
    deadline = time.monotonic() + 20
    while subprocess.run(["pgrep", "-g", str(started.pid)], **quiet).returncode == 0:
        assert time.monotonic() < deadline, "workers outlive the study that was killed"
        time.sleep(0.1)
