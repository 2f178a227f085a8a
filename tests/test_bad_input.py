"""Every bad input gets a typed error of one actionable sentence before anything expensive starts."""

import contextlib
import dataclasses
import json
import re
import shutil
import socket

import pytest
import torch
from transformers import GPT2Config

from helpers import evaluation, loading, memory, profiles, prompting, records, training
from helpers.errors import (
    AdapterError,
    CheckpointError,
    DataError,
    DivergedError,
    ModelError,
    NotQuantizedError,
    OutputError,
    ProfileError,
)
from tests.test_helpers import Card

GOOD = '{"prompt": "a", "answer": "b"}\n'


@pytest.fixture
def nothing_expensive(monkeypatch):
    """Fails the test if a model is loaded."""
    monkeypatch.setattr(loading, "load_base", lambda *a, **k: pytest.fail("a model was loaded before the input was checked"))


def fails_from_the_command_line(capsys, *arguments: str) -> str:
    """Run the command line, expect exit status 1, and return its one line of error."""
    assert training.main(list(arguments)) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if "Error:" in line]) == 1
    assert "Traceback" not in "\n".join(lines)
    return lines[-1]


FILES = {
    "missing file": ("gone.jsonl", None, r"no file '.*gone\.jsonl'.*check the name"),
    "empty file": ("data.jsonl", b"", "data.jsonl is empty: give"),
    "blank lines only": ("data.jsonl", b"\n\n", "holds no rows: give"),
    "invalid JSON": ("data.jsonl", GOOD.encode() + b'{"prompt": \n', "line 2 is not valid JSON.*one JSON object"),
    "not an object": ("data.jsonl", b"[1]\n", "line 1 is a JSON list.*one JSON object"),
    "missing column": ("data.jsonl", b'{"promt": "a", "answer": "b"}\n', "row 1 has no column 'prompt': choose one of 'promt'"),
    "number for text": (
        "data.jsonl",
        GOOD.encode() + b'{"prompt": "a", "answer": 3}\n',
        "row 2: 'answer' is 3, not a text: correct or remove",
    ),
    "null for text": ("data.jsonl", b'{"prompt": null, "answer": "b"}\n', "row 1: 'prompt' is None"),
    "empty answer": ("data.jsonl", b'{"prompt": "a", "answer": " "}\n', "row 1: 'answer' is ' '"),
    "missing csv column": ("data.csv", b"prompt,reply\na,b\n", "has no column 'answer'"),
    "unknown ending": ("data.txt", b"hello", "ends in '.txt': rename or convert"),
    "not UTF-8": ("data.jsonl", '{"prompt": "é", "answer": "b"}'.encode("latin-1"), "not UTF-8 at byte 12: save it"),
    "not Parquet": ("data.parquet", b"PAR1 or not", "not a readable Parquet file: write"),
    "too few to split": ("data.jsonl", GOOD.encode() * 3, "3 rows are too few.*give at least 10"),
    "all too long": (
        "data.jsonl",
        (json.dumps({"prompt": "word " * 400, "answer": "b"}) + "\n").encode() * 20,
        "all 18 examples are longer than max_length=128",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES)
def test_bad_data_files(tmp_path, capsys, nothing_expensive, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    line = fails_from_the_command_line(capsys, "--data", str(path), "--output", str(tmp_path / "out"))
    with pytest.raises(DataError, match=message):
        raise DataError(line)
    assert line.startswith("DataError: ")


def test_a_folder_for_a_file(tmp_path, capsys, nothing_expensive):
    assert "is a folder: name one file" in fails_from_the_command_line(
        capsys, "--data", str(tmp_path), "--output", str(tmp_path / "out")
    )


def test_unknown_profile(capsys, nothing_expensive):
    line = fails_from_the_command_line(capsys, "--profile", "colab-t5")
    assert line.startswith("ProfileError: there is no profile 'colab-t5': choose auto or one of tiny")


def test_gpu_profile_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ProfileError, match="'colab-t4' needs a GPU and none was found: use profile 'tiny'"):
        profiles.resolve("colab-t4")


@pytest.mark.parametrize(
    ("card", "profile", "message"),
    [
        (
            Card("GeForce GTX 1080", 8.5, 6),
            "colab-t4",
            "made for a card of 15 GB and GeForce GTX 1080 has 8.5 GB: use profile 'tiny'",
        ),
        (Card("Tesla T4", 15.8, 7), "colab-l4", "card of 23 GB and Tesla T4 has 15.8 GB: use profile 'colab-t4'"),
        (
            Card("Tesla V100-SXM2-32GB", 34.1, 7),
            "colab-l4",
            "computes in bfloat16, which Tesla V100-SXM2-32GB does not have: use profile 'colab-t4'",
        ),
    ],
)
def test_a_card_too_small_or_without_the_dtype(monkeypatch, card, profile, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    with pytest.raises(ProfileError, match=message):
        profiles.resolve(profile)


# --- models -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied_model(tmp_path, tiny):
    """(folder, profile) of a copy of the tiny Falcon that a test may damage."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.model_path, folder)
    return folder, dataclasses.replace(tiny, model=str(folder))


def test_no_model_at_the_path(tmp_path, tiny):
    with pytest.raises(ModelError, match="no model found at '.*nowhere'.*check the name"):
        loading.load_base(dataclasses.replace(tiny, model=str(tmp_path / "nowhere")))


def test_no_tokenizer_at_the_path(tmp_path, tiny):
    with pytest.raises(ModelError, match="no tokenizer found for '.*nowhere'"):
        loading.load_tokenizer(dataclasses.replace(tiny, model=str(tmp_path / "nowhere")))


def test_a_base_that_is_not_a_falcon(tmp_path, tiny):
    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a 'gpt2' model.*choose a model of type 'falcon'"):
        loading.load_base(dataclasses.replace(tiny, model=str(tmp_path)))


@pytest.mark.skipif(loading.quantizes_falcon(), reason="this version of transformers needs no repair")
def test_a_base_that_did_not_become_4bit(monkeypatch, tiny):
    monkeypatch.setattr(loading, "falcon_made_of_plain_linear", contextlib.nullcontext)
    with pytest.raises(NotQuantizedError, match="0 of 16 linear layers are 4-bit.*load it with helpers.loading.load_base"):
        loading.load_base(tiny)


def test_a_base_quantized_another_way(monkeypatch, tiny):
    original = loading.quantization_config

    def without_double(profile):
        config = original(profile)
        config.bnb_4bit_use_double_quant = False
        return config

    monkeypatch.setattr(loading, "quantization_config", without_double)
    with pytest.raises(NotQuantizedError, match="check quantization_config"):
        loading.load_base(tiny)


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_damaged_safetensors(copied_model, keep):
    folder, profile = copied_model
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ModelError, match="cannot be read: delete the local copy"):
        loading.load_base(profile)


def test_pickled_weights_are_not_loaded(copied_model):
    folder, profile = copied_model
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError):
        loading.load_base(profile)


def test_unknown_config(tmp_path):
    with pytest.raises(ModelError, match="no config of 'gpt2' is stored here: choose one of"):
        memory.known_config("gpt2")


# --- adapters ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(base, tiny, tmp_path):
    return loading.save_adapter(loading.attach_lora(base, tiny), tmp_path / "adapter")


def check(folder, profile):
    loading.check_adapter(folder, profile, memory.known_config("data/tiny-falcon"))


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_good_adapter_passes(adapter, tiny):
    check(adapter, tiny)


def test_adapter_of_another_base(adapter, tiny):
    with pytest.raises(AdapterError, match="was trained on 'data/tiny-falcon'.*not on 'tiiuae/falcon-7b'.*load that base"):
        check(adapter, dataclasses.replace(tiny, model=profiles.FALCON_7B))


def test_adapter_of_another_revision(adapter, tiny):
    with pytest.raises(AdapterError, match="revision abc"):
        check(adapter, dataclasses.replace(tiny, revision="abc"))


def test_adapter_of_another_shape(adapter, tiny):
    edit_config(adapter, r=8)
    with pytest.raises(AdapterError, match="has shape .* needs .* another base or rank"):
        check(adapter, tiny)


def test_adapter_folder_missing(tmp_path, tiny):
    with pytest.raises(AdapterError, match="holds no readable adapter_config.json"):
        check(tmp_path / "gone", tiny)


def test_adapter_truncated(adapter, tiny):
    data = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(AdapterError, match="is damaged: save or copy it again"):
        check(adapter, tiny)


def test_adapter_pickled(adapter, tiny):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterError, match="pickled files are not loaded"):
        check(adapter, tiny)


# --- training ---------------------------------------------------------------------------------------------------------------


def test_output_folder_not_writable(tmp_path, capsys, nothing_expensive):
    (tmp_path / "file").write_text("in the way")
    line = fails_from_the_command_line(capsys, "--output", str(tmp_path / "file" / "run"))
    assert line.startswith("OutputError: the output folder") and "choose another with --output" in line
    with pytest.raises(OutputError):
        training.output_folder(profiles.PROFILES["tiny"], tmp_path / "file")


def test_a_full_disk_is_told_before_anything_is_loaded(tmp_path, capsys, nothing_expensive, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    line = fails_from_the_command_line(capsys, "--output", str(tmp_path / "run"))
    assert re.match(
        r"OutputError: the disk of '.*run' has 1 MB free and checkpoints and adapter take up to 5 MB: free some", line
    )


def test_a_loss_that_is_not_a_number_stops_the_run(base, tiny, tokenizer, tmp_path):
    encoded, _ = prompting.encode(records.read_tickets("validation"), tokenizer, tiny.max_length)
    profile = dataclasses.replace(tiny, max_steps=3)
    model = loading.attach_lora(base, profile)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).fill_(float("nan"))
    with pytest.raises(DivergedError, match="the loss at step 1 is nan: lower the learning rate"):
        training.train(training.build_trainer(model, tokenizer, encoded, profile, tmp_path))


def test_a_batch_larger_than_the_data():
    with pytest.raises(DataError, match="a batch of 16 needs at least 16 examples and there are 5"):
        prompting.length_grouped_order([1] * 5, 16, 10, 0)


def test_a_checkpoint_of_another_run(tmp_path):
    from helpers import checkpoints

    folder = tmp_path / "checkpoints" / "checkpoint-1"
    folder.mkdir(parents=True)
    (folder / checkpoints.MARKER).write_text(json.dumps({"identity": "other", "files": {}}))
    with pytest.raises(CheckpointError, match="checkpoint-1 .* another profile, seed or data: choose another --output"):
        checkpoints.newest_checkpoint(tmp_path, "mine")


# --- evaluation -------------------------------------------------------------------------------------------------------------


def test_answers_and_references_of_different_number():
    with pytest.raises(DataError, match="2 answers cannot be scored against 1 references"):
        evaluation.score_tickets(["a", "b"], ["{}"])


def test_text_too_short_for_perplexity(base, tokenizer):
    with pytest.raises(DataError, match="the text has 1 tokens.*give a longer text"):
        evaluation.perplexity(base, tokenizer, "a")


@pytest.fixture
def attempts(monkeypatch, tmp_path):
    """The file where attempts made on purpose are logged, so that the session's own log keeps every other one."""
    log = tmp_path / "attempts.log"
    monkeypatch.setenv("NETWORK_GUARD_LOG", str(log))
    return log


def test_network_guard_is_on(attempts):
    with pytest.raises(OSError, match="network guard"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    assert "192.0.2.1" in attempts.read_text()


def test_hub_data_without_network_is_told(attempts, nothing_expensive, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub is asked six times, with waits of 23 s between
    with pytest.raises(DataError, match="no file and no hub data set 'nobody/nothing'"):
        records.read_records("nobody/nothing")
