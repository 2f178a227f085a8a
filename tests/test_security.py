"""Nobody is let in: no pickle that runs code, no remote code, no secret or machine path in what is stored, loopback only."""

import ast
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch

from helpers import checkpoints, loading, profiles, prompting, records, training
from tests.notebooks import NOTEBOOKS, ROOT, code_cells, source

SECRETS = {
    "Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "GitHub token": r"\b(?:ghp|gho|ghs|ghr)_[A-Za-z0-9]{36}|\bgithub_pat_\w{30,}",
    "AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "Google key": r"\bAIza[A-Za-z0-9_-]{35}",
    "OpenAI key": r"\bsk-[A-Za-z0-9_-]{32,}",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "password in an address": r"[a-z]+://[^\s/:@\"']+:[^\s/@\"']+@",
    "home folder": r"(?:/home|/Users|/root|C:\\+Users)[/\\]+\w+",
    "temporary folder": "/" + r"tmp/\w+",
}
PLANTED = {  # put together here, so that this file does not hold what the scan looks for
    "Hugging Face token": "hf_" + "a1B2" * 9,
    "GitHub token": "ghp_" + "a1B2" * 9,
    "AWS key": "AKIA" + "Z7" * 8,
    "Google key": "AIza" + "x" * 35,
    "OpenAI key": "sk-" + "a1B2" * 9,
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "password in an address": "https://me:secret" + "@example.org",
    "home folder": "/home" + "/alice/data",
    "temporary folder": "/" + "tmp/run1",
}


def secrets(text: str) -> list[str]:
    return [name for name, pattern in SECRETS.items() if re.search(pattern, text)]


def shipped() -> list:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    listed = [ROOT / name for name in names if name] or [p for p in ROOT.rglob("*") if not {".venv", ".git"} & set(p.parts)]
    return [
        path
        for path in listed
        if path.is_file() and path.suffix in (".py", ".ipynb", ".md", ".json", ".toml", ".txt", ".csv", ".yml", ".cfg")
    ]


@pytest.mark.parametrize("name", SECRETS)
def test_the_scan_finds_what_is_planted(name):
    notebook = json.dumps({"cells": [{"outputs": [{"text": [f"loaded {PLANTED[name]} and went on"]}]}]})
    assert secrets(notebook) == [name]


def test_nothing_that_is_shipped_holds_a_secret_or_a_machines_path():
    found = {path.name: names for path in shipped() if (names := secrets(path.read_text(encoding="utf-8", errors="ignore")))}
    found.pop("test_contract.py", None)  # names the patterns that it looks for in outputs
    assert not found


def calls():
    """(where, call) of every call in helpers, data scripts and notebooks."""
    for path in [*(ROOT / "helpers").rglob("*.py"), *(ROOT / "data").glob("*.py")]:
        yield from ((path.name, node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    for path in NOTEBOOKS:
        for cell in code_cells(path):
            yield from ((path.name, node) for node in ast.walk(ast.parse(source(cell))) if isinstance(node, ast.Call))


def test_remote_code_is_trusted_nowhere():
    for where, call in calls():
        for keyword in call.keywords:
            if keyword.arg == "trust_remote_code":
                assert isinstance(keyword.value, ast.Constant) and keyword.value.value is False, where


def test_no_pickle_is_loaded_but_with_weights_only():
    for where, call in calls():
        name = ast.unparse(call.func)
        assert name not in ("pickle.load", "pickle.loads", "joblib.load", "dill.load"), where
        if name == "torch.load":
            assert any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in call.keywords), where


def test_hub_models_are_pinned_to_commits():
    for profile in profiles.PROFILES.values():
        assert (ROOT / profile.model).is_dir() or re.fullmatch(r"[0-9a-f]{40}", profile.revision), profile.name


class Malicious:
    """Unpickled without care, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_malicious_checkpoint_does_not_run(tiny, tokenizer, tmp_path, monkeypatch):
    """Somebody swaps the optimizer's file and seals the checkpoint again: resuming fails, and nothing of theirs is executed."""

    profile = replace(tiny, max_steps=4, save_steps=2, micro_batch=2)
    encoded, _ = prompting.encode(records.read_tickets("train").select(range(8)), tokenizer, profile.max_length)

    def trainer():
        model = loading.attach_lora(loading.load_base(profile), profile)
        return training.build_trainer(model, tokenizer, encoded, profile, tmp_path)

    training.train(trainer())
    newest = tmp_path / "checkpoints" / "checkpoint-2"
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-4")

    trap = tmp_path / "executed"
    torch.save(Malicious(trap), newest / "optimizer.pt")
    marker = json.loads((newest / checkpoints.MARKER).read_text())
    marker["files"]["optimizer.pt"] = checkpoints.file_hash(newest / "optimizer.pt")
    (newest / checkpoints.MARKER).write_text(json.dumps(marker))
    assert checkpoints.is_sound(newest)
    with pytest.raises(Exception, match="(?i)weights.only|unpickl"):
        training.train(trainer(), resume=True)
    assert not trap.exists()
    torch.load(newest / "optimizer.pt", weights_only=False)  # the trap works where care is not taken
    assert trap.exists()


def test_a_data_set_with_a_script_does_not_run(tmp_path):
    """A folder that holds a loading script, as hub data sets once did: refused, not executed."""
    trap = tmp_path / "executed"
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(trap)!r}, 'w')\n")
    for name in (tmp_path / "evil", tmp_path / "evil" / "evil.py"):
        with pytest.raises(Exception, match="is a folder|ends in"):
            records.read_records(str(name))
    assert not trap.exists()


def test_jupyter_listens_on_this_machine_only_and_keeps_its_token():
    recipe = re.search(r"^lab:.*\n\t(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    assert "--ip=127.0.0.1" in recipe and "token" not in recipe.lower()
