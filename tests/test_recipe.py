"""Notebook 05's recipe: complete without helpers, for any file."""

import ast
import csv
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from transformers import TrainingArguments

from helpers import checkpoints, errors, prompting, records, training
from helpers.errors import TutorialError
from tests.notebooks import code_cells, load_definitions, notebook, read, source, tags

PATH = notebook("05")
RECIPE = [source(cell) for cell in code_cells(PATH) if "recipe" in tags(cell)]
CALLS = ("BitsAndBytesConfig(", "modeling_falcon.FalconLinear = torch.nn.Linear", "LoraConfig(")
CALLS += ("prepare_model_for_kbit_training(", "get_peft_model(", "TrainingArguments(", "Trainer(")
CALLS += ("model.generate(", "PeftModel.from_pretrained(")
NOT_READ = {"PROFILE", "DROP_BAD_ROWS", "RESUME", "DRIVE", "PUSH"}  # by the recipe


def test_every_call_stands_in_the_open():
    cells = [source(cell) for cell in code_cells(PATH) if "setup" not in tags(cell)]
    assert [call for call in CALLS if call not in "\n".join(cells)] == []
    assert len(read(PATH)["cells"]) <= 45


def test_recipe_needs_nothing_of_this_repository():
    assert set(re.findall(r"(?m)^(\w+) = ", RECIPE[0])) > NOT_READ
    code = "\n".join(RECIPE[1:])
    assert "helpers" not in code
    assert not NOT_READ & {node.id for node in ast.walk(ast.parse(code)) if type(node) is ast.Name}


def test_order_is_the_command_lines():
    grouped_by_length = load_definitions("05", "grouped_by_length")["grouped_by_length"]
    for rows, batch, steps, seed in ((40, 16, 9, 0), (16, 16, 5, 1), (2000, 4, 300, 2)):
        lengths = torch.randint(9, 99, (rows,)).tolist()
        order = prompting.length_grouped_order(lengths, batch, steps, seed)
        assert grouped_by_length(lengths, batch, steps, seed) == order


def test_of_two_cards_one_is_used(tiny, tmp_path, monkeypatch):
    def found_two(arguments):
        prepare(arguments)
        arguments._n_gpu = 2

    prepare = TrainingArguments.__post_init__
    monkeypatch.setattr(TrainingArguments, "__post_init__", found_two)
    assert TrainingArguments(str(tmp_path), use_cpu=True).n_gpu == 2
    names = {"STEPS": 8, "LEARNING_RATE": 0.0, "SEED": 0, "OUTPUT": tmp_path}
    exec(RECIPE[1] + "\n" + RECIPE[7], names)  # noqa: S102 - our own
    ours = training.training_arguments(training.replace(tiny, max_steps=8), tmp_path, 0)
    for arguments in (names["arguments"], ours):
        assert arguments.n_gpu == 1 and arguments.warmup_steps == 2  # a quarter of the steps


def test_an_unfinished_run_is_gone_on_with_or_told_and_never_deleted(tiny, tokenizer, tmp_path):
    cell = next(c for c in map(source, code_cells(PATH)) if "checkpoints proven complete" in c)
    rows, _ = prompting.encode(records.read_tickets("validation"), tokenizer, tiny.max_length)
    (folder := tmp_path / "checkpoint-4").mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 4, "max_steps": 9}')
    checkpoints.mark_complete(folder, checkpoints.run_identity(tiny, rows, 0))
    names = {"arguments": SimpleNamespace(output_dir=tmp_path), "profile": tiny, "RESUME": True}
    names |= {"train_rows": rows, "checkpoint": None, "trainer": Mock(), "torch": torch}
    names |= {"Path": Path, "json": json, "checkpoints": checkpoints} | vars(errors)
    for steps, seed, words in ((4, 0, "is reached"), (2, 0, "at step 2"), (9, 1, "seed 0, now 1")):
        with pytest.raises(TutorialError, match=words):
            exec(cell, names | {"SEED": seed, "run": {"max_steps": steps}})  # noqa: S102 - our own
    exec(cell, last := names | {"SEED": 0, "run": {"max_steps": 9}})  # noqa: S102 - our own
    assert last["checkpoint"] == folder and folder.exists()
    line = next(c for c in map(source, code_cells(PATH)) if "only_run_in" in c).splitlines()[-1]
    exec(line, names := {"checkpoints": checkpoints, "OUTPUT": tmp_path})  # noqa: S102 - our own
    with ThreadPoolExecutor() as pool, pytest.raises(TutorialError, match="another run trains"):
        pool.submit(exec, line, names).result()  # as a second notebook


def test_notebook_runs_with_a_readers_own_file(tmp_path, monkeypatch):
    with (tmp_path / "faq.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "question", "reply"])
        # answers that a JSON reader would make dates of
        rows.writerows([n, f'When is "{n}", please?', f"2026-01-{n % 9 + 10}"] for n in range(60))
    monkeypatch.setenv("QLORA_RUNS", str(tmp_path))
    book = nbformat.read(PATH, as_version=4)
    form = next(cell for cell in book.cells if "recipe" in cell.metadata.get("tags", ()))
    form.source += f"\nDATA, STEPS = {str(tmp_path / 'faq.csv')!r}, 8"
    (slow,) = [cell for cell in book.cells if "claim-use-recipe" in tags(cell)]
    slow.source = ""  # it has rows of its own
    form.source += "\nPROMPT_COLUMN, ANSWER_COLUMN, OUTPUT = 'question', 'reply', 'own'"
    NotebookClient(book, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    printed = "".join(o.get("text", "") for c in book.cells for o in c.get("outputs", ()))
    assert "exact match" in printed and "loss a token" in printed
    assert (tmp_path / "own" / "adapter" / "adapter_model.safetensors").exists()
