"""Nobody is let in: no pickle that runs code, no remote code, no code that comes with data, however it comes."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from helpers import checkpoints, files, lessons, loading, profiles, prompting, records, training, weights
from helpers.errors import AdapterError, ModelError
from tests import refresh, scrubbed
from tests.notebooks import NOTEBOOKS, ROOT, code_cells, source
from tests.unsafe_calls import faults

MODULES = [path for folder in ("helpers", "data", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
TRAP = "# the trap"  # marks the one unsafe call here: it proves that the trap works where care is not taken


def code():
    """(place, source) of every module, script, test and code cell."""
    yield from ((path.relative_to(ROOT), path.read_text(encoding="utf-8")) for path in MODULES)
    yield from ((path.name, source(cell)) for path in NOTEBOOKS for cell in code_cells(path))


def test_no_code_loads_pickles_trusts_remote_code_or_follows_a_moving_model():
    found = [
        (str(place), line, what)
        for place, text in code()
        for line, what in faults(text)
        if not text.splitlines()[line - 1].endswith(TRAP)
    ]
    assert not found


@pytest.mark.parametrize(
    "planted",
    [
        "import torch\ntorch.load('a.pt')",
        "import torch\ntorch.load('a.pt', weights_only=False)",
        "from torch import load as read\nread('a.pt')",
        "import pickle as p\np.loads(b'')",
        "from pickle import Unpickler\nUnpickler(file).load()",
        "import joblib\njoblib.load('a')",
        "import numpy as np\nnp.load('a.npy', allow_pickle=True)",
        "import pandas as pd\npd.read_pickle('a')",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.UnsafeLoader)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=trusted)",
        "options = {'trust_remote_code': True}",
        "AutoModel.from_pretrained('tiiuae/falcon-7b')",
        "AutoModel.from_pretrained('tiiuae/falcon-7b', revision='main')",
    ],
)
def test_the_scan_finds_what_is_planted(planted):
    assert len(list(faults(planted))) == 1


def test_the_scan_lets_careful_code_pass():
    commit = "0123456789abcdef" * 2 + "01234567"
    careful = f"""
import numpy as np, torch, yaml
torch.load('a.pt', weights_only=True)
np.load('a.npy')
np.load('a.npy', allow_pickle=False)
yaml.load(text, Loader=yaml.SafeLoader)
AutoModel.from_pretrained('tiiuae/falcon-7b', revision='{commit}', trust_remote_code=False)
"""
    assert not list(faults(careful))


def test_hub_models_are_pinned_to_commits_and_configs_name_no_code():
    for profile in profiles.PROFILES.values():
        assert (ROOT / profile.model).is_dir() or re.fullmatch(r"[0-9a-f]{40}", profile.revision), profile.name
    for path in (ROOT / "data").rglob("*.json"):
        assert "auto_map" not in path.read_text(encoding="utf-8"), f"{path.name} names code to be fetched with the model"


class Malicious:
    """Unpickled without care, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_malicious_checkpoint_does_not_run(tiny, tokenizer, tmp_path):
    """Somebody swaps a pickled file and seals the checkpoint again: resuming fails, and nothing of theirs is executed."""

    profile = replace(tiny, max_steps=4, save_steps=2, micro_batch=2)
    encoded, _ = prompting.encode(records.read_tickets("train").select(range(8)), tokenizer, profile.max_length)

    def trainer():
        model = loading.attach_lora(loading.load_base(profile), profile)
        return training.build_trainer(model, tokenizer, encoded, profile, tmp_path)

    training.train(trainer())
    newest = tmp_path / "checkpoints" / "checkpoint-2"
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-4")
    trap = tmp_path / "executed"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        sound = (newest / name).read_bytes()
        torch.save(Malicious(trap), newest / name)
        seal(newest, name)
        assert checkpoints.is_sound(newest)
        with pytest.raises(Exception, match="(?i)weights.only|unpickl"):
            training.train(trainer(), resume=True)
        assert not trap.exists(), name
        (newest / name).write_bytes(sound)
        seal(newest, name)
    torch.save(Malicious(trap), tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)  # the trap
    assert trap.exists()


def seal(checkpoint, name: str) -> None:
    """Write a file's new hash into the checkpoint's marker, as somebody would who can write there."""
    marker = json.loads((checkpoint / checkpoints.MARKER).read_text())
    marker["files"][name] = files.sha256(checkpoint / name)
    (checkpoint / checkpoints.MARKER).write_text(json.dumps(marker))


def test_malicious_weights_do_not_run(tiny, base, tmp_path):
    """As a model's pickled weights, loaded or converted, and as an adapter's."""
    trap = tmp_path / "executed"
    torch.save({"word_embeddings.weight": Malicious(trap)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pytorch_model.bin"):
        weights.load_pickled(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pytorch_model.bin"):
        weights.convert_pickled(tmp_path)
    adapter = loading.save_adapter(loading.attach_lora(base, tiny), tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(Malicious(trap), adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickled files are not loaded"):
        loading.load_adapter(base, adapter, tiny)
    assert not trap.exists()


def test_a_data_set_with_a_script_does_not_run(tmp_path, monkeypatch):
    """A folder that holds a loading script, as hub data sets once did: refused, not executed."""
    trap = tmp_path / "executed"
    (tmp_path / "evil" / "data").mkdir(parents=True)
    for script in (tmp_path / "evil" / "evil.py", tmp_path / "evil" / "data" / "data.py"):
        script.write_text(f"open({str(trap)!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "evil", tmp_path / "evil" / "evil.py", "evil/data"):  # the last looks like a name of the hub
        with pytest.raises(Exception, match="is a folder|ends in"):
            records.read_records(str(name))
    assert not trap.exists()


def test_a_malicious_notebook_does_not_run(tmp_path, monkeypatch):
    """Read by every tool here that reads notebooks and is not meant to execute them, it leaves no file."""
    trap = tmp_path / "executed"
    spring = f"open({str(trap)!r}, 'w')"
    notebook = json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))
    cell = next(
        cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "setup" not in cell["metadata"].get("tags", [])
    )
    cell["source"] = f"wanted = 1\n{spring}\ndef unwanted(x={spring}):\n    pass\n"
    cell["metadata"] = {"init_cell": True}
    cell["outputs"] = [{"output_type": "display_data", "data": {"text/html": "<script>alert(1)</script>"}, "metadata": {}}]
    (tmp_path / "notebooks").mkdir()
    evil = tmp_path / "notebooks" / "66_evil.ipynb"
    evil.write_text(json.dumps(notebook), encoding="utf-8")

    monkeypatch.setattr(lessons, "ROOT", tmp_path)
    assert lessons.load_definitions("66", "wanted")["wanted"] == 1
    assert scrubbed.scrub_file(evil)
    refresh.replace_setup_cell(evil)
    assert [cell for cell in code_cells(evil) if spring in source(cell)]
    assert not trap.exists()
    with pytest.raises(LookupError):
        lessons.load_definitions("66", "unwanted", "nowhere")
    assert trap.exists(), "a definition that was asked for is executed: the trap works"
