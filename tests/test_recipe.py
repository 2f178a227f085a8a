"""Notebook 05's recipe: complete without helpers, for any file."""

import ast
import csv
import re

import nbformat
import torch
from nbclient import NotebookClient
from transformers import TrainingArguments

from helpers import prompting, training
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
    names = {"STEPS": 8, "SEED": 0, "OUTPUT": tmp_path}
    exec(RECIPE[1] + "\n" + RECIPE[7], names)  # noqa: S102 - our own
    assert names["arguments"].n_gpu == 1
    assert training.training_arguments(tiny, tmp_path, 0).n_gpu == 1


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
    assert "exact match" in printed
    assert "loss a token" in printed
    assert (tmp_path / "own" / "adapter" / "adapter_model.safetensors").exists()
