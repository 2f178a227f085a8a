"""Every public function of helpers that refuses something, given what it refuses: the error's type, and the value and the way out in its words.

The functions are read from the source (those that raise an error of `helpers.errors`), so that a new one without a case fails.
"""

import ast
import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config

from helpers import errors, evaluation, loading, memory, profiles, prompting, records, rehearsal, scaling, shapes, weights
from helpers.adapters import check_names, generate_mixed, load_adapters, trained
from helpers.data_report import inspect_data
from helpers.environment import mount_drive
from helpers.gpus import capacity
from helpers.hub import check_hashes
from helpers.processes import share
from helpers.rows import rows_of_file
from helpers.study import intervals, plan, runner
from helpers.study import rows as study_rows
from tests.notebooks import ROOT

TINY, FALCON = profiles.PROFILES["tiny"], memory.known_config(profiles.FALCON_7B)
ON_T4 = memory.gpu_profile(profiles.FALCON_7B, "T4", 1, 512)
CARD = shapes.known_config("data/tiny-falcon")


def change(**settings):
    return dataclasses.replace(TINY, **settings)


def pair(*roles: str) -> list[dict]:
    return [{"role": role, "content": "x"} for role in roles]


def dataset(*answers: str):
    return records.Dataset.from_list(
        [{"prompt": "a", "answer": answer, "place": f"row {i}"} for i, answer in enumerate(answers, 1)]
    )


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(folder: Path, name: str, content: str | bytes):
    return list(rows_of_file(written(folder, name, content)))


def encode(texts, length: int = 128):
    return prompting.encode(texts, loading.load_tokenizer(TINY), length)


RUN = plan.make("grid", "lora", "nf4", 1e-3, 0)
# (function, what is done, error, words); `p` is an empty folder
CASES = [
    ("profiles.resolve", lambda p: profiles.resolve("T4"), "ProfileError", "no profile 'T4': choose auto or one of tiny"),
    ("profiles.check_card", lambda p: profiles.check_card(profiles.PROFILES["colab-l4"]), "ProfileError", "'colab-l4' needs a GPU and none was found: use profile 'tiny'"),
    *(("profiles.check_settings", lambda p, v=v: profiles.check_settings(change(learning_rate=v)), "ProfileError", rf"learning_rate of profile 'tiny' is {v}: give a finite number") for v in (0, -0.1, math.nan, math.inf)),
    *(("profiles.check_settings", lambda p, n=n: profiles.check_settings(change(**{n: 0})), "ProfileError", rf"{n} of profile 'tiny' is 0: give a whole number of at least") for n in ("micro_batch", "accumulation", "max_length", "max_steps", "lora_r")),
    ("gpus.capacity", lambda p: capacity("T5"), "PlanError", "no GPU 'T5' in the table: choose one of .*T4"),
    ("memory.check", lambda p: memory.plan(FALCON, ON_T4, "qlorra"), "PlanError", "no method 'qlorra' in this planner: choose one of full, lora, qlora"),
    ("memory.check", lambda p: memory.plan(FALCON, ON_T4, attention="flash"), "PlanError", "no attention implementation 'flash'.*: choose one of sdpa"),
    ("memory.check", lambda p: memory.plan(FALCON, dataclasses.replace(ON_T4, optimizer="adam")), "PlanError", "no optimizer 'adam'.*: choose one of adamw_torch"),
    ("memory.check", lambda p: memory.plan(FALCON, dataclasses.replace(ON_T4, target_modules=("q_proj",))), "PlanError", "no target module 'q_proj'.*: choose one of query_key_value"),
    *(("memory.check", lambda p, v=v: memory.plan(FALCON, dataclasses.replace(ON_T4, micro_batch=v)), "PlanError", f"a batch of {v!r} cannot be planned: give a whole number of at least 1") for v in (0, -1, 1.5, "2")),
    *(("memory.check", lambda p, v=v: memory.plan(FALCON, dataclasses.replace(ON_T4, max_length=v)), "PlanError", f"a length of {v} cannot be planned: give a whole number") for v in (0, -512)),
    ("memory.check", lambda p: memory.plan(FALCON, dataclasses.replace(ON_T4, lora_r=0)), "PlanError", "a rank of 0 cannot be planned: give a whole number"),
    ("scaling.card_plan", lambda p: scaling.card_plan(FALCON, ON_T4, "qlora", 2, "tensor"), "PlanError", "no strategy 'tensor'.*: choose one of ddp, fsdp"),
    *(("scaling.card_plan", lambda p, v=v: scaling.card_plan(FALCON, ON_T4, "qlora", v, "ddp"), "PlanError", f"{v!r} cards cannot be planned for: give a whole number") for v in (0, -1, 1.5)),
    *(("scaling.hours", lambda p, v=v: scaling.hours(1e6, v), "PlanError", f"tokens a second of {v} give no time: give a number above 0") for v in (0, -1, math.nan)),
    ("scaling.hours", lambda p: scaling.hours(1e6, 100, cards=0), "PlanError", "cards of 0 give no time: give a number above 0"),
    ("shapes.known_config", lambda p: shapes.known_config("gpt2"), "ModelError", "no config of 'gpt2' is stored here: choose one of"),
    ("shapes.read_config", lambda p: shapes.read_config(str(p / "no.json")), "ModelError", "no.json' is neither known nor a readable config.json: give one"),
    ("shapes.read_config", lambda p: shapes.read_config(str(written(p, "config.json", '{"model_type": "llama"}'))), "ModelError", "a 'llama' model and this planner knows Falcon: give a config"),
    ("shapes.read_config", lambda p: shapes.read_config(str(written(p, "config.json", "[]"))), "ModelError", "a None model and this planner knows Falcon: give a config"),
    ("shapes.check_config", lambda p: shapes.check_config(GPT2Config()), "ModelError", "'gpt2' is no Falcon config: give a FalconConfig"),
    *(("processes.share", lambda p, v=v: share(TINY, v), "LaunchError", f"{v} processes cannot .*: start") for v in (0, -2, 3, 32)),
    ("records.read_records", lambda p: records.read_records(p / "no.csv"), "DataError", "no file '.*no.csv': check the name"),
    ("records.read_records", lambda p: records.read_records(written(p, "a.jsonl", '{"prompt": "a", "answer": ""}')), "DataError", "row 1: 'answer' is '', not a text: correct or remove"),
    ("records.read_records", lambda p: records.read_records(written(p, "a.jsonl", '{"prompt": "a", "answer": "x\\nUser: y"}')), "DataError", "row 1: the answer contains .*User.*: remove it"),
    ("records.read_records", lambda p: records.read_records(written(p, "a.jsonl", '{"prompt": "a<|endoftext|>", "answer": "x"}')), "DataError", "row 1: 'prompt' contains the end token .*: remove it"),
    *(("records.split_records", lambda p, n=n: records.split_records(dataset(*"b" * n)), "DataError", f"{n} rows are too few to hold out 10% for a test: give at least 10") for n in (1, 9)),
    ("rows.rows_of_file", lambda p: read(p, "a.csv", "a,a\n1,2\n"), "DataError", "a.csv, row 1 names the column 'a' twice: rename"),
    ("rows.rows_of_file", lambda p: read(p, "a.csv", 'a,b\n"1,2\n'), "DataError", "a.csv, line 2 is not valid CSV .*: check its quotes"),
    ("rows.rows_of_file", lambda p: read(p, "a.json", "[1, "), "DataError", "a.json is not valid JSON .*: give one list of objects"),
    ("rows.rows_of_file", lambda p: read(p, "a.parquet", "PAR1"), "DataError", "a.parquet is not a readable Parquet file: write it again"),
    ("rows.rows_of_file", lambda p: read(p, "a.jsonl", b"\xff\xfe{"), "DataError", "a.jsonl is UTF-16: save it with the encoding UTF-8"),
    ("rows.rows_of_file", lambda p: read(p, "a.jsonl", b"{\0}"), "DataError", "a.jsonl, line 1 holds a zero byte .byte 1.*: save it as UTF-8"),
    ("rows.rows_of_file", lambda p: read(p, "a.xlsx", "x"), "DataError", "a.xlsx ends in '.xlsx': rename or convert"),
    ("rows.rows_of_file", lambda p: list(rows_of_file(Path("/dev/null"))), "DataError", "'/dev/null' is not an ordinary file .*: write the data to a file"),
    *(("prompting.chat_to_pair", lambda p, r=r: prompting.chat_to_pair(pair(*r)), "DataError", "has the roles .*: alternate user and assistant") for r in ((), ("user",), ("user", "user"), ("assistant", "user"))),
    ("prompting.chat_to_pair", lambda p: prompting.chat_to_pair([{"role": "user"}]), "DataError", "no text under 'role' and 'content' in message 1: give both"),
    ("prompting.chat_to_pair", lambda p: prompting.chat_to_pair([{"role": "user", "content": "a\nUser: b"}]), "DataError", "begins a turn of the template inside message 1: remove"),
    ("prompting.encode", lambda p: encode(dataset("b", " ")), "DataError", "row 2: the answer is ' ', of no length: give an answer"),
    ("prompting.encode", lambda p: encode(dataset("b"), 3), "DataError", "all 1 examples are longer than max_length=3 tokens .*: raise max_length"),
    ("prompting.check_labels", lambda p: prompting.check_labels(records.Dataset.from_list([{"labels": [-100, -100]}])), "DataError", "every label of 1 of 1 examples is -100.*: .* keep the answer's labels"),
    ("prompting.length_grouped_order", lambda p: prompting.length_grouped_order([1] * 5, 6, 1, 0), "DataError", "a batch of 6 needs at least 6 examples and there are 5: add data"),
    *(("prompting.length_grouped_order", lambda p, b=b, s=s: prompting.length_grouped_order([1] * 5, b, s, 0), "DataError", f"{s} steps of {b} examples cannot be put in order: give at least 1") for b, s in ((0, 3), (-1, 3), (2, 0))),
    *(("prompting.generate", lambda p, n=n, b=b: prompting.generate(None, None, ["a"], n, b), "ProfileError", "is (0|-1|None): give a whole number of at least 1") for n, b in ((0, 1), (8, 0), (8, -1), (None, 1))),
    ("evaluation.check_numbers", lambda p: evaluation.score_tickets(["a"], []), "DataError", "1 answers cannot be scored against 0 references: give one answer for each"),
    ("evaluation.score_replies", lambda p: evaluation.score_replies([], ["{}"]), "DataError", "0 replies cannot be scored against 1 tickets: give one reply for each"),
    ("evaluation.check_numbers", lambda p: evaluation.score(["a"], ["b", "c"]), "DataError", "1 answers cannot be scored against 2 references: give one answer for each"),
    ("evaluation.perplexity", lambda p: evaluation.perplexity(None, loading.load_tokenizer(TINY), "a"), "DataError", "the text has 1 tokens .*: give a longer text"),
    ("data_report.inspect_data", lambda p: inspect_data(dataset("b").select([]), dataset("b"), None, 128), "DataError", "the training set holds no rows: give at least one"),
    ("loading.load_tokenizer", lambda p: loading.load_tokenizer(change(model=str(p))), "ModelError", "no tokenizer found for '.*': check the name"),
    ("loading.load_config", lambda p: loading.load_config(change(model=str(p / "no"))), "ModelError", "no model found at '.*no': check the name"),
    ("loading.check_adapter", lambda p: loading.check_adapter(p, TINY, CARD), "AdapterError", "holds no readable adapter_config.json: name the folder"),
    ("loading.check_adapter", lambda p: loading.check_adapter(written(p, "adapter_config.json", "{}").parent, TINY, CARD), "AdapterError", "names no rank r: name the folder that save_adapter wrote"),
    ("adapters.trained", lambda p: trained("poem", TINY), "AdapterError", "no task 'poem': choose one of ticket, reply"),
    ("adapters.load_adapters", lambda p: load_adapters(None, {}, TINY), "AdapterError", "no adapter is named: give at least one name"),
    *(("adapters.load_adapters", lambda p, n=n: load_adapters(None, {n: p}, TINY), "AdapterError", f"{n!r} cannot be the name of an adapter: choose one") for n in ("", "a.b", "a/b", "__base__")),
    ("adapters.check_names", lambda p: check_names(SimpleNamespace(peft_config={"a": None}), ["b"]), "AdapterError", "no adapter 'b' on this model: choose of a"),
    ("adapters.generate_mixed", lambda p: generate_mixed(None, None, ["a"], ["x", "y"], 8), "AdapterError", "1 prompts and 2 adapter names do not pair: give one name for each"),
    ("environment.mount_drive", lambda p: mount_drive(), "SetupError", "can be mounted on Colab only and this is .*: set DRIVE = False"),
    ("weights.check_disk", lambda p: weights.check_disk(p / "x", 10**15, "a thing"), "OutputError", "GB free and a thing takes up to 1,000,000.0 GB: free some"),
    ("weights.check_disk", lambda p: weights.check_disk(written(p, "f", "") / "x", 1, "a thing"), "OutputError", "'.*f' is no folder or is read-only: choose another folder for a thing"),
    ("weights.write_safetensors", lambda p: weights.write_safetensors(p / "a", {"w": (3,)}, torch.float32, lambda name: [torch.zeros(2)]), "ModelError", "tensor w came with 8 bytes where its shape .3,. says 3 elements"),
    ("weights.refuse_pickled", lambda p: weights.refuse_pickled(str(written(p, "pytorch_model.bin", "").parent), None), "PickledWeightsError", "are pickled .pytorch_model.bin.*: convert them once with `python -m helpers.weights"),
    ("weights.load_pickled", lambda p: weights.load_pickled(written(p, "pytorch_model.bin", "x")), "ModelError", "pytorch_model.bin in '.*' is no sound file of tensors: fetch it again"),
    ("weights.convert_pickled", lambda p: weights.convert_pickled(p), "ModelError", "no pytorch_model.*bin in '.*': name the folder"),
    ("rehearsal.check_places", lambda p: rehearsal.check_places(p, written(p, "a.json", "[]")), "OutputError", "a.json' is no JSON object .*: choose another file"),
    ("intervals.mean_interval", lambda p: intervals.mean_interval([1.0]), "DataError", "needs at least 2 values and 1 were given: run more seeds"),
    ("plan.plan", lambda p: plan.plan("metods", []), "DataError", "no experiment 'metods': choose one of grid"),
    ("plan.best_learning_rate", lambda p: plan.best_learning_rate([], "lora", "nf4"), "DataError", "the grid holds the learning rates .*: run the experiment 'grid' first"),
    *(("runner.check", lambda p, k=k, v=v: runner.check(dataclasses.replace(RUN, **{k: v})), "DataError", f"a run cannot have {k} {v!r}.*: (choose one of|give at least)|rank 0 and|and 7 examples") for k, v in (("method", "lorra"), ("format", "nf5"), ("data", "x"), ("targets", "x"), ("rank", 0), ("examples", 7))),
    ("rows.read_rows", lambda p: study_rows.read_rows(p), "DataError", "'.*' is a folder, or lies in none: name a CSV file"),
    ("rows.read_rows", lambda p: study_rows.read_rows(written(p, "s.csv", "a,b")), "DataError", "s.csv ends within line 1: run python -m helpers.study, which repairs it"),
    ("rows.read_row", lambda p: study_rows.read_row(p / "s.csv", 3, ["x"]), "DataError", "s.csv line 3 has 1 values for .* columns: correct or remove that line"),
    ("hub.check_hashes", lambda p: check_hashes(damaged(p)), "ModelError", "a.safetensors has sha256 .* where the hub says .*: it is deleted, run again"),
]  # fmt: skip
# What refuses something only with a model, a disk or other processes around it, and the tests that do that.
ELSEWHERE = {
    "test_bad_input.py": ["proof.prove_4bit", "loading.load_base", "loading.read_4bit", "outputs.output_folder", "training.run", "checkpoints.newest_checkpoint", "rows.rows_of_hub"],
    "test_adapters.py": ["adapters.read_trained", "ask.check_message", "loading.load_adapter"],
    "test_beyond.py": ["sharding.prove_sharded", "sharding.load_sharded", "sharding.run", "files.writing", "processes.loss_of_a_process_is_told"],
    "test_quantized_cache.py": ["quantized_cache.save"],
    "test_rehearsal.py": ["rehearsal.watched", "rehearsal.work", "random_checkpoint.write_checkpoint"],
    "test_survive.py": ["hub.check_room", "hub.ask_for_token"],
    "test_hub.py": ["hub.fetch"],
    "test_setup_cell.py": ["environment.prepare"],
    "test_study.py": ["runner.training_steps", "formats.load_format"],
    "test_exercises.py": ["__init__.check", "judging.call", "judging.expect", "judging.judge_number", "judging.judge_tensor"],
    "test_numbers.py": ["divergence.on_log", "divergence.check_finite", "prompting.__call__"],
}  # fmt: skip


def damaged(folder: Path) -> Path:
    """A snapshot whose one file is not what its name in the cache, its hash, says."""
    written(folder, "0" * 64, "x")
    (folder / "a.safetensors").symlink_to(folder / ("0" * 64))
    return folder


@pytest.mark.parametrize(("function", "act", "error", "words"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_bad_call(function, act, error, words, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(errors.TutorialError) as told:
        act(tmp_path)
    assert type(told.value).__name__ == error
    assert re.search(words, str(told.value)), str(told.value)
    assert "\n" not in str(told.value)


def refusing() -> set[str]:
    """module.function of every function in helpers that raises an error of ours by name; what a nested or private one raises is its caller's."""
    ours = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.TutorialError)}
    found = set()
    for path in (ROOT / "helpers").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and (node.name[0] != "_" or node.name == "__call__")
        ]
        for function in functions:
            raised = [
                node.exc.func for node in ast.walk(function) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
            ]
            if any(isinstance(name, ast.Name) and name.id in ours for name in raised):
                found.add(f"{path.stem}.{function.name}")
    return found - {"rehearsal.main"}


def test_every_function_that_refuses_something_has_a_case():
    tried = {case[0] for case in CASES} | {name for names in ELSEWHERE.values() for name in names}
    assert refusing() <= tried, f"no case for {sorted(refusing() - tried)}"


def test_there_are_many(capsys):
    with capsys.disabled():
        print(f"\nbad calls: {len(CASES)} cases over {len({case[0] for case in CASES})} functions")
    assert len(CASES) >= 60
