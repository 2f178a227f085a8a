"""The study of notebook 07: its plan, its file, its scores, and a run that repeats a stored row."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from helpers import loading, memory, prompting, records
from helpers.errors import DataError
from helpers.lessons import load_definitions
from helpers.study import __main__ as command
from helpers.study import formats, intervals, pool, runner, scoring, skew
from helpers.study.plan import (
    EQUAL_PARAMETERS,
    EXPERIMENTS,
    FEW,
    GRID,
    VARIANT_GRID,
    VARIANTS,
    WAYS,
    best_learning_rate,
    missing,
    plan,
)
from helpers.study.rows import COLUMNS, append, as_run, read_rows
from helpers.study.run import BATCH, TARGETS, Run
from tests.notebooks import ROOT

TINY_RUN = Run("methods", "lora", "nf4+dq", "all", 16, 2400, 1e-3, 0)


@pytest.fixture(scope="module")
def stored():
    return read_rows()


# The plan


def test_the_study_was_run_in_full(stored):
    assert [run for name in EXPERIMENTS for run in missing(name, stored)] == []
    assert len({as_run(row) for row in stored}) == len(stored)


def test_every_cell_has_the_seeds_it_should(stored):
    for name in set(EXPERIMENTS) - {"grid"}:
        cells: dict = {}
        for run in plan(name, stored):
            cells.setdefault((run.method, run.format, run.targets, run.rank, run.examples, run.data), []).append(run.seed)
        assert {len(set(seeds)) for seeds in cells.values()} == {3 if name == "few-data" else 5}, name


def test_each_method_has_the_best_learning_rate_of_one_grid(stored):
    for way in (*WAYS, *VARIANTS):
        best = best_learning_rate(stored, *way)
        losses = {
            rate: [r["validation_loss"] for r in stored if (r["experiment"], r["method"], r["format"], r["learning_rate"]) == ("grid", *way, rate)]
            for rate in (GRID if way in WAYS else VARIANT_GRID)
        }  # fmt: skip
        means = {rate: sum(values) / len(values) for rate, values in losses.items()}
        assert means[best] == min(means.values())
    with pytest.raises(
        DataError, match=r"the grid holds the learning rates \[\] for full on fp32.*run the experiment 'grid' first"
    ):
        best_learning_rate([], "full", "fp32")


def test_equal_parameters_are_equal():
    config = memory.known_config("data/tiny-falcon")
    counts = {rank * memory.adapter_parameters(config, 1, TARGETS[targets]) for targets, rank in EQUAL_PARAMETERS.items()}
    assert counts == {memory.adapter_parameters(config, 16, TARGETS["all"])}


# The file


def row(**changes) -> dict:
    return {column: None for column in COLUMNS} | {
        "experiment": "grid", "method": "lora", "format": "nf4", "targets": "all", "rank": 16, "examples": 50, "learning_rate": 1e-3,
        "seed": 0, "data": "tickets", "test_exact": 0.5, "python": "3", **dict.fromkeys(COLUMNS[-6:], "1.0"),
    } | changes  # fmt: skip


def test_rows_come_back_as_they_went(tmp_path):
    file = tmp_path / "study.csv"
    assert read_rows(file) == []
    for seed in range(3):
        append(file, row(seed=seed))
    assert read_rows(file) == [row(seed=seed) for seed in range(3)]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_cut_off_is_told_and_repaired_and_no_whole_row_is_lost(tmp_path, cut):
    file = tmp_path / "study.csv"
    for seed in range(3):
        append(file, row(seed=seed))
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(DataError, match=r"study.csv ends within line 4: run python -m helpers.study"):
        read_rows(file)
    assert [r["seed"] for r in read_rows(file, repair=True)] == [0, 1]
    append(file, row(seed=7))
    assert [r["seed"] for r in read_rows(file)] == [0, 1, 7]


def test_a_header_cut_off_is_an_empty_file(tmp_path):
    file = tmp_path / "study.csv"
    file.write_text("experiment,meth")
    assert read_rows(file, repair=True) == []
    append(file, row())
    assert read_rows(file) == [row()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [lines[0].replace("method", "metod"), *lines[1:]], r"line 1 has unknown columns \['metod'\], lacks \['method'\]"),
        (lambda lines: [lines[0], lines[1] + ",1", lines[2]], rf"line 2 has {len(COLUMNS) + 1} values for {len(COLUMNS)} columns"),
        (lambda lines: [*lines[:2], lines[2].replace(",16,", ",sixteen,")], "line 3: rank is 'sixteen', not a number"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_with_the_line(tmp_path, capsys, change, message):
    file = tmp_path / "study.csv"
    append(file, row())
    append(file, row(seed=1))
    damaged = "\n".join(change(file.read_text().splitlines())) + "\n"
    file.write_text(damaged)
    assert command.main(["--file", str(file)]) == 1
    with pytest.raises(DataError, match=message):
        raise DataError(capsys.readouterr().err)
    assert file.read_text() == damaged  # nothing was lost


def test_what_is_there_is_not_run_again(capsys):
    assert command.main(["--experiment", "methods"]) == 0
    assert f"methods: {5 * len(WAYS)} runs are there, 0 to go" in capsys.readouterr().out


# Bad runs


@pytest.mark.parametrize(
    "change",
    [{"method": "lorra"}, {"format": "int8"}, {"data": "poems"}, {"examples": BATCH - 1}, {"targets": "norms"}, {"rank": 0}],
    ids=str,
)
def test_a_run_that_cannot_be_is_refused(change):
    with pytest.raises(DataError, match=str(next(iter(change.values())))):
        runner.execute(replace(TINY_RUN, **change))


def test_unknown_experiment():
    with pytest.raises(DataError, match="there is no experiment 'gird': choose one of grid"):
        plan("gird", [])


# What is measured


def test_int4_is_the_grid_of_notebook_02():
    lesson = load_definitions("02", "INT4", "round_to")
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(formats.round_to_int4(w), lesson["round_to"](w, lesson["INT4"], 64))


@pytest.mark.parametrize("format", ["nf4+dq", "nf4", "fp4"])
def test_bytes_while_training_are_those_of_the_real_model(format):
    run = Run("methods", "lora", format, "all", 16, 2400, 1e-3, 0)
    model = formats.prepare(run)
    trained = loading.trainable_parameters(model)
    # float32 is what the rest is held in here; a 16-bit base has it in two bytes
    held = sum(p.nbytes if not p.is_floating_point() else 2 * p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    constants = 0
    for layer in loading.four_bit_layers(model).values():
        state = layer.weight.quant_state
        constants += state.absmax.nbytes + (state.state2.absmax.nbytes + 4 if state.nested else 0)
    assert formats.training_bytes(model, run) == pytest.approx(held + constants + 16 * trained, rel=1e-3)


def test_one_pass_tells_what_generation_would(tokenizer):
    """The model's own greedy answers count as right, and stop counting when one token of them is changed."""
    model = formats.load_format("fp32").eval()
    rows = []
    for prompt in records.read_tickets("test")["prompt"][:12]:
        answer = prompting.generate_ids(model, tokenizer, [prompt], 12)[0]
        ids = tokenizer(prompting.build_prompt(prompt))["input_ids"]
        rows.append({"input_ids": ids + answer, "labels": [prompting.IGNORED] * len(ids) + answer})
    right, loss = scoring.answer_losses(model, rows)
    assert all(right)
    for row in rows[::2]:
        row["labels"][-1] = (row["labels"][-1] + 1) % len(tokenizer)
    changed, greater = scoring.answer_losses(model, rows)
    assert changed == [i % 2 == 1 for i in range(12)] and greater > loss


def test_skewed_rows_are_skewed_as_they_say():
    group, high = skew.skewed_products(), skew.urgency_tokens()[skew.URGENCIES.index("high")]
    normal = skew.urgency_tokens()[skew.URGENCIES.index("normal")]
    for data, least, most in (("skewed-labels", 0.85, 0.95), ("rebalanced", 0.05, 0.15)):
        rows = runner.training_rows(Run("bias", "lora", "nf4+dq", "all", 16, 2400, 1e-3, 0, data))
        originals = {tuple(r["input_ids"][:-3]): evaluation_ticket for r, evaluation_ticket in zip(scoring.encoded("train"), tickets(), strict=True)}  # fmt: skip
        labels = [
            r["labels"][-3]
            for r in rows
            if (t := originals[tuple(r["input_ids"][:-3])])["product"] in group and t["urgency"] == "normal"
        ]
        assert set(labels) == {high, normal}
        assert least < labels.count(high) / len(labels) < most, data


def tickets() -> list[dict]:
    return [json.loads(answer) for answer in records.read_tickets("train")["answer"]]


def test_a_pair_differs_in_the_product_alone(tokenizer):
    group = skew.skewed_products()
    for mine, other in list(zip(*skew.message_pairs(), strict=True))[:20]:
        a, b = (tokenizer.decode(row["input_ids"]) for row in (mine, other))
        product = next(name for name in group if name in a)
        assert product not in b and len(a.split(product)) == 3  # in the message and in the ticket
        assert all(part in b for part in a.split(product))


def test_intervals():
    # published quantiles of Student's t distribution
    for degrees, value in ((1, 12.706), (2, 4.303), (4, 2.776), (30, 2.042)):
        assert intervals.t_quantile(degrees) == pytest.approx(value, abs=6e-4)
    assert intervals.mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5), abs=1e-3)
    with pytest.raises(DataError, match="at least 2 values and 1 were given"):
        intervals.mean_interval([1.0])


def test_few_data_sees_as_many_examples_as_it_says():
    for n in FEW:
        assert len(runner.training_rows(Run("few-data", "lora", "nf4+dq", "all", 16, n, 1e-3, 0))) == n


# A run again


def test_killed_and_started_again_it_repeats_the_stored_rows(tmp_path, stored):
    """SIGKILL after the first row: that row is whole and is the stored one; no worker lives on; the rest is still to do."""
    file = tmp_path / "study.csv"
    for grid in (r for r in stored if r["experiment"] == "grid"):
        append(file, grid)
    before = len(read_rows(file))
    started = subprocess.Popen(
        [sys.executable, "-m", "helpers.study", "--experiment", "recovers", "--file", str(file)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while len(read_rows(file, repair=True)) == before and time.monotonic() < deadline:
        time.sleep(0.5)
    started.send_signal(signal.SIGKILL)
    started.wait()
    rows = read_rows(file, repair=True)[before:]
    assert rows
    wanted = {as_run(r): r for r in stored}
    for found in rows:
        assert found["perplexity"] == pytest.approx(wanted[as_run(found)]["perplexity"], rel=2e-3)
        assert found["perplexity_before"] == pytest.approx(wanted[as_run(found)]["perplexity_before"], rel=1e-4)
    assert len(missing("recovers", read_rows(file))) == len(plan("recovers", stored)) - len(rows)
    for _ in range(100):  # the workers notice that their parent is gone
        try:
            os.killpg(started.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("workers outlive the study that was killed")


def test_a_stored_row_is_what_a_run_gives(stored):
    """The same run again, score within the spread of its five seeds (on the machine of the file: the same number)."""
    chosen = next(run for run in plan("methods", stored) if run.method == "full")
    cell = [
        r for r in stored if as_run(r) in set(plan("methods", stored)) and (r["method"], r["format"]) == ("full", chosen.format)
    ]
    wanted = next(r for r in cell if as_run(r) == chosen)
    found = next(pool.execute_all([chosen], workers=1, progress=False))
    spread = max(r["test_exact"] for r in cell) - min(r["test_exact"] for r in cell)
    assert abs(found["test_exact"] - wanted["test_exact"]) <= max(spread, 0.02)
