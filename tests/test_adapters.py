"""Adapters in use: switching, mixed batches, merging and combining against what they must equal; finding and training; bad input."""

import dataclasses
import json
import os
import pty
import subprocess
import sys
import warnings

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load, save_file

from helpers import adapters, ask, cards, evaluation, lessons, loading, memory, profiles, prompting, records, training
from helpers.errors import AdapterError, DataError

TINY = profiles.PROFILES["tiny"]


def random_adapter(folder, seed: int, profile=TINY):
    """An untrained adapter whose B is not zero, so that it changes every layer's output."""
    model = loading.attach_lora(loading.load_base(profile), profile, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return loading.save_adapter(model, folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three adapters, two of rank 16 and one of rank 8: {name: folder}."""
    root = tmp_path_factory.mktemp("adapters")
    small = dataclasses.replace(TINY, lora_r=8)
    return {
        "a": random_adapter(root / "a", 1),
        "b": random_adapter(root / "b", 2),
        "small": random_adapter(root / "small", 3, small),
    }


@pytest.fixture
def model(folders):
    return adapters.load_adapters(loading.load_base(TINY), {"a": folders["a"], "b": folders["b"]}, TINY)


@pytest.fixture(scope="module")
def taught():
    """What notebook 06 teaches."""
    names = ("PROFILE", "profile", "lora_by_row", "adapters_by_row", "merged_weight", "dequantized")
    return lessons.load_definitions("06", *names)


@pytest.fixture(scope="module")
def prompts():
    return records.read_tickets("test")["prompt"][:66]


def batch_of(tokenizer, prompts):
    """(inputs, mask of real tokens) of a padded batch of prompts."""
    ids = [tokenizer(prompting.build_prompt(prompt))["input_ids"] for prompt in prompts]
    batch = prompting.Collator(tokenizer.eos_token_id)([{"input_ids": row, "labels": row} for row in ids])
    batch.pop("labels")
    return batch, batch["attention_mask"].bool()


def lora_layers(model) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.inference_mode()
def logits_alone(model, name, inputs):
    if name == adapters.BASE:
        with model.disable_adapter():
            return model(**inputs).logits
    model.set_adapter(name)
    return model(**inputs).logits


# --- switching --------------------------------------------------------------------------------------------------------------


def test_each_adapter_beside_another_is_as_alone(model, folders, tokenizer, prompts):
    inputs, _ = batch_of(tokenizer, prompts[:8])
    for name in ("a", "b", "a"):
        single = loading.load_adapter(loading.load_base(TINY), folders[name], TINY)
        with torch.inference_mode():
            assert torch.equal(logits_alone(model, name, inputs), single(**inputs).logits)
    assert not torch.allclose(logits_alone(model, "a", inputs), logits_alone(model, "b", inputs), atol=0.1)


def test_the_base_beneath_keeps_every_bit(model, tokenizer, prompts):
    adapters.generate_mixed(model, tokenizer, prompts[:3], ["a", "b", adapters.BASE], 4)
    assert loading.base_fingerprint(model) == loading.base_fingerprint(loading.load_base(TINY))


# --- mixed batches ----------------------------------------------------------------------------------------------------------

NAMES = ["a", "b", adapters.BASE] * 22


def test_mixed_batch_logits_equal_each_alone(model, tokenizer, prompts):
    inputs, real = batch_of(tokenizer, prompts)
    with torch.inference_mode():
        mixed = model(**inputs, adapter_names=NAMES).logits
    for name in ("a", "b", adapters.BASE):
        rows = torch.tensor([other == name for other in NAMES])
        own = logits_alone(model, name, inputs)
        torch.testing.assert_close(mixed[rows][real[rows]], own[rows][real[rows]], atol=1e-3, rtol=1e-4)
        assert (mixed - own)[~rows][real[~rows]].abs().max() > 0.5


def test_mixed_batch_by_hand_equals_peft(model, taught, tokenizer, prompts):
    inputs, real = batch_of(tokenizer, prompts)
    with torch.inference_mode():
        mixed = model(**inputs, adapter_names=NAMES).logits
        with taught["adapters_by_row"](model, NAMES):
            by_hand = model(**inputs).logits
        torch.testing.assert_close(by_hand[real], mixed[real], atol=1e-3, rtol=1e-4)
        assert torch.equal(model(**inputs, adapter_names=NAMES).logits, mixed)  # nothing of the hooks is left


def test_lora_by_row_equals_a_loop_over_rows(taught):
    generator = torch.Generator().manual_seed(0)
    x, A, B = (torch.randn(shape, generator=generator) for shape in ((5, 3, 64), (2, 4, 64), (2, 32, 4)))
    rows = torch.tensor([1, 0, 1, 1, 0])
    wanted = torch.stack([x[i] @ A[k].T @ B[k].T for i, k in enumerate(rows)])
    torch.testing.assert_close(taught["lora_by_row"](x, A, B, rows), wanted, atol=1e-4, rtol=1e-4)


def test_mixed_batch_answers_equal_each_alone(model, tokenizer, prompts):
    mixed = adapters.generate_mixed(model, tokenizer, prompts, NAMES, 12)
    for name in ("a", "b", adapters.BASE):
        rows = [i for i, other in enumerate(NAMES) if other == name]
        mine = [prompts[i] for i in rows]
        if name == adapters.BASE:
            with model.disable_adapter():
                own = prompting.generate_batch(model, tokenizer, mine, 12)
        else:
            model.set_adapter(name)
            own = prompting.generate_batch(model, tokenizer, mine, 12)
        assert [mixed[i] for i in rows] == own


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", adapters.BASE]), min_size=1, max_size=9))
def test_any_assignment_of_rows(shared_model, tokenizer, prompts, names):
    inputs, real = batch_of(tokenizer, prompts[: len(names)])
    with torch.inference_mode():
        mixed = shared_model(**inputs, adapter_names=names).logits
    for i, name in enumerate(names):
        own = logits_alone(shared_model, name, inputs)
        torch.testing.assert_close(mixed[i][real[i]], own[i][real[i]], atol=1e-3, rtol=1e-4)


@pytest.fixture(scope="module")
def shared_model(folders):
    return adapters.load_adapters(loading.load_base(TINY), {"a": folders["a"], "b": folders["b"]}, TINY)


def test_unknown_name_in_a_mixed_batch(shared_model, tokenizer, prompts):
    with pytest.raises(AdapterError, match="there is no adapter 'c' on this model: choose of a, b, __base__"):
        adapters.generate_mixed(shared_model, tokenizer, prompts[:2], ["a", "c"], 4)


def test_names_that_do_not_pair_with_prompts(shared_model, tokenizer, prompts):
    with pytest.raises(AdapterError, match="2 prompts and 3 adapter names do not pair"):
        adapters.generate_mixed(shared_model, tokenizer, prompts[:2], ["a", "b", "a"], 4)


# --- merging and combining --------------------------------------------------------------------------------------------------


def parts(layer, name):
    """(W dequantized, A, B, scaling) of a LoRA layer on a 4-bit base."""
    weight = layer.base_layer.weight
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    return dequantize_4bit(weight.data, weight.quant_state), A, B, layer.scaling[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_into_16_and_32_bit_by_hand_equals_peft(model, taught, folders, dtype):
    plain = taught["dequantized"](loading.load_base(TINY), dtype)
    merged = PeftModel.from_pretrained(plain, str(folders["a"])).merge_and_unload()
    layers = lora_layers(model.get_base_model())
    assert len(layers) == 4 * model.config.num_hidden_layers
    for name, layer in layers.items():
        W, A, B, scaling = parts(layer, "a")
        assert torch.equal(merged.get_submodule(name).weight, taught["merged_weight"](W.to(dtype), A, B, scaling))


def test_merge_into_4_bit_by_hand_equals_peft(model, taught, folders):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merge lora module to 4-bit")  # it is what is tested
        merged = loading.load_adapter(loading.load_base(TINY), folders["a"], TINY).merge_and_unload()
    assert len(loading.four_bit_layers(merged)) == 4 * model.config.num_hidden_layers
    for name, layer in lora_layers(model.get_base_model()).items():
        packed, state = quantize_4bit(taught["merged_weight"](*parts(layer, "a")), quant_type="nf4", compress_statistics=True)
        weight = merged.get_submodule(name).weight
        assert torch.equal(weight.data, packed)
        assert torch.equal(weight.quant_state.absmax, state.absmax)


def test_merged_float32_answers_as_the_adapter_does(model, taught, folders, tokenizer, prompts):
    inputs, real = batch_of(tokenizer, prompts[:16])
    plain = taught["dequantized"](loading.load_base(TINY), torch.float32)
    merged = PeftModel.from_pretrained(plain, str(folders["a"])).merge_and_unload().eval()
    with torch.inference_mode():
        torch.testing.assert_close(merged(**inputs).logits[real], logits_alone(model, "a", inputs)[real], atol=2e-3, rtol=1e-4)


def test_merged_folder_is_an_ordinary_model(taught, folders, tokenizer, prompts, tmp_path):
    from transformers import AutoModelForCausalLM

    plain = taught["dequantized"](loading.load_base(TINY), torch.bfloat16)
    merged = PeftModel.from_pretrained(plain, str(folders["a"])).merge_and_unload().eval()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    inputs, _ = batch_of(tokenizer, prompts[:4])
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, merged(**inputs).logits)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 1.0), (0.3, -1.0)])
def test_cat_is_the_weighted_sum_of_the_updates(model, weights):
    model.add_weighted_adapter(["a", "b"], list(weights), "sum", combination_type="cat")
    assert model.peft_config["sum"].r == 2 * TINY.lora_r
    for layer in lora_layers(model).values():
        wanted = weights[0] * layer.get_delta_weight("a") + weights[1] * layer.get_delta_weight("b")
        torch.testing.assert_close(layer.get_delta_weight("sum"), wanted, atol=1e-4, rtol=1e-4)


# --- the reply's score ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation", "test", "test_reworded"])
def test_every_reply_of_the_data_is_complete(split):
    replies, tickets = records.read_tickets(split, "reply")["answer"], records.read_tickets(split)["answer"]
    assert evaluation.score_replies(replies, tickets) == {
        "complete": 1.0, "deadline": 1.0, "fields": dict.fromkeys(evaluation.REPLY_FIELDS, 1.0),
    }  # fmt: skip


GOOD = "Thank you for writing. We will replace the tea pot from order A1234 today."
TICKET = {"intent": "damage", "product": "tea pot", "order": "A1234", "urgency": "high"}


@pytest.mark.parametrize(
    ("reply", "wrong"),
    [
        (GOOD, set()),
        (GOOD.replace("tea pot", "teapot"), {"product"}),
        (GOOD.replace("A1234", "A1235"), {"order"}),
        (GOOD.replace("A1234", "A1234 and B5678"), {"order"}),
        (GOOD.replace("replace", "refund"), {"remedy"}),
        (GOOD.replace("We will replace the", "We will refund the tea pot and will replace the"), {"remedy"}),
        (GOOD.replace("We will replace", "You should replace"), {"remedy"}),
        (GOOD.replace("today", "this week"), {"deadline"}),
        (GOOD.replace("today", "today or this month"), {"deadline"}),
        (GOOD.removesuffix("."), {"ends"}),
        (GOOD + "\nUser: thanks.", {"ends"}),
        (GOOD + " Thank you for writing.", {"ends"}),
        ("", {*evaluation.REPLY_FIELDS, "deadline"}),
    ],
)
def test_what_a_reply_gets_wrong_is_seen(reply, wrong):
    assert {field for field, right in evaluation.check_reply(reply, TICKET).items() if not right} == wrong
    score = evaluation.score_replies([reply], [json.dumps(TICKET)])
    assert score["complete"] == (not wrong - {"deadline"}) and score["deadline"] == ("deadline" not in wrong)


def test_replies_of_another_number():
    with pytest.raises(DataError, match="1 replies cannot be scored against 2 tickets"):
        evaluation.score_replies(["a"], ["{}", "{}"])


# --- found or trained -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A profile of four steps, and runs/ in a folder of its own."""
    monkeypatch.setattr(adapters, "ROOT", tmp_path)
    return dataclasses.replace(TINY, max_steps=4, save_steps=4, max_new_tokens=2)


@pytest.fixture
def trainings(monkeypatch):
    """Counts how often a training runs."""
    runs, original = [], training.train
    monkeypatch.setattr(training, "train", lambda *a, **k: runs.append(1) or original(*a, **k))
    return runs


def test_an_adapter_is_trained_once_and_then_found(quick, trainings, capsys):
    first = adapters.trained("reply", quick)
    assert first.record["task"] == "reply" and first.record["steps"] == 3 and len(trainings) == 1
    assert len(first.answers) == 300 and first.record["after"]["complete"] == 0
    again = adapters.trained("reply", quick)
    assert len(trainings) == 1 and again.record == first.record and again.answers == first.answers
    assert "found in runs/tiny-reply-adapter" in capsys.readouterr().out


def test_what_does_not_belong_is_left_aside_with_the_reason(quick, trainings, capsys):
    found = adapters.trained("reply", quick)
    path, fingerprint = found.folder.parent / "results.json", loading.base_fingerprint(loading.load_base(TINY))
    asked = dataclasses.replace(quick, max_steps=3)
    for key, value in (("steps", 2), ("seed", 9), ("profile", "colab-t4"), ("versions", {"torch": "1.0"})):
        path.write_text(json.dumps(found.record | {key: value}))
        with pytest.raises(AdapterError, match=f"it was trained with {key} "):
            adapters.read_trained(path.parent, asked, fingerprint)
    path.write_text(json.dumps(found.record))
    with pytest.raises(AdapterError, match="it was trained with base_sha256 "):
        adapters.read_trained(path.parent, asked, "0" * 64)
    weights = found.folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    adapters.trained("reply", quick)
    assert len(trainings) == 2
    out = capsys.readouterr().out
    assert "reply adapter in runs/tiny-reply-adapter is left aside: adapter_model.safetensors" in out and "is damaged" in out
    assert str(adapters.ROOT) not in out.split("is left aside")[0]


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"profile": "tiny"}'])
def test_a_record_that_cannot_be_read(folders, tmp_path, content):
    os.symlink(folders["a"], tmp_path / "adapter")
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(AdapterError, match=r"results\.json in .* does not say how the adapter was trained"):
        adapters.read_trained(tmp_path, TINY, "0")


def test_an_unknown_task():
    with pytest.raises(AdapterError, match="there is no task 'poem': choose one of ticket, reply"):
        adapters.trained("poem", TINY)


# --- loading: bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a.b", adapters.BASE])
def test_names_that_cannot_be_used(base, folders, name):
    with pytest.raises(AdapterError, match="cannot be the name of an adapter"):
        adapters.load_adapters(base, {name: folders["a"]}, TINY)


def test_no_adapter_named(base):
    with pytest.raises(AdapterError, match="no adapter is named"):
        adapters.load_adapters(base, {}, TINY)


def test_one_bad_folder_among_good_ones_loads_nothing(base, folders, tmp_path):
    with pytest.raises(AdapterError, match="holds no readable adapter_config.json"):
        adapters.load_adapters(base, {"a": folders["a"], "gone": tmp_path / "gone"}, TINY)
    assert not lora_layers(base)


def test_adapters_of_different_ranks_share_a_base(base, folders, tokenizer, prompts):
    model = adapters.load_adapters(base, {"a": folders["a"], "small": folders["small"]}, TINY)
    assert len(adapters.generate_mixed(model, tokenizer, prompts[:2], ["a", "small"], 2)) == 2


def spoil_config(change):
    def spoil(folder):
        path = folder / "adapter_config.json"
        path.write_text(change(path.read_text()))

    return spoil


def spoil_tensors(change):
    def spoil(folder):
        path = folder / "adapter_model.safetensors"
        tensors = change(load(path.read_bytes()))
        save_file(tensors, path)

    return spoil


def with_values(**values):
    return spoil_config(lambda text: json.dumps(json.loads(text) | values))


def drop_config(folder):
    (folder / "adapter_config.json").unlink()


def pickle_weights(folder):
    weights = folder / "adapter_model.safetensors"
    torch.save(load(weights.read_bytes()), folder / "adapter_model.bin")
    weights.unlink()


def pickle_under_another_name(folder):
    weights = folder / "adapter_model.safetensors"
    torch.save(load(weights.read_bytes()), weights)


def truncate(share):
    def spoil(folder):
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[: int(share * weights.stat().st_size)])

    return spoil


BAD_ADAPTERS = {
    "no config": (drop_config, "holds no readable adapter_config.json: name the folder"),
    "config is not JSON": (spoil_config(lambda text: text[:20]), "holds no readable adapter_config.json"),
    "config is a list": (spoil_config(lambda text: "[]"), "names no rank r"),
    "no rank": (with_values(r=None), "names no rank r"),
    "another rank": (with_values(r=8), "has shape .* needs .* another base or rank"),
    "another base": (with_values(base_model_name_or_path="tiiuae/falcon-7b"), "was trained on 'tiiuae/falcon-7b'.*load that base"),
    "empty file": (truncate(0), "is damaged: save or copy it again"),
    "half a file": (truncate(0.5), "is damaged"),
    "no tensors": (spoil_tensors(lambda tensors: {}), "has 0 tensors"),
    "one tensor missing": (spoil_tensors(lambda tensors: dict(list(tensors.items())[1:])), "has 31 tensors.*save or copy it again"),
    "foreign layers": (
        spoil_tensors(lambda tensors: {k.replace("query_key_value", "q_proj"): v for k, v in tensors.items()}),
        "q_proj.* has shape .* another base or rank",
    ),
    "pickled": (pickle_weights, "pickled files are not loaded, they can run code"),
    "pickled under another name": (pickle_under_another_name, "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), BAD_ADAPTERS.values(), ids=BAD_ADAPTERS)
def test_bad_adapters(folders, tmp_path, spoil, message):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in folders["a"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spoil(folder)
    with pytest.raises(AdapterError, match=message):
        loading.check_adapter(folder, TINY, memory.known_config("data/tiny-falcon"))


def test_a_good_adapter_with_fewer_targets_passes(tmp_path):
    narrow = dataclasses.replace(TINY, target_modules=("query_key_value",))
    folder = random_adapter(tmp_path / "narrow", 0, narrow)
    loading.check_adapter(folder, TINY, memory.known_config("data/tiny-falcon"))


def test_an_empty_adapter_folder(tmp_path):
    with pytest.raises(AdapterError, match="holds no readable adapter_config.json"):
        loading.check_adapter(tmp_path, TINY, memory.known_config("data/tiny-falcon"))


# --- the card ---------------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_record_says(quick):
    found = adapters.trained("reply", quick)
    card = cards.write_card(found.folder, quick, found.record, "a message to a reply", "the tickets", ("Hello", "Thank you."))
    assert (found.folder / "README.md").read_text() == card
    head, body = card.removeprefix("---\n").split("---\n", 1)
    assert "base_model: data/tiny-falcon\n" in head and "library_name: peft\n" in head
    for fact in (
        "16 layers in NF4", "r = 16, alpha = 32", "3 steps of 16 examples, seed 0", "122,880 of", "the tickets",
        f"transformers {found.record['versions']['transformers']}", "| complete | 0.000 |", "Assistant: Thank you.", "learning rate 0.002",
    ):  # fmt: skip
        assert fact in body
    assert "None" not in card
    loading.check_adapter(found.folder, quick, memory.known_config("data/tiny-falcon"))  # the card does not disturb


# --- the terminal -----------------------------------------------------------------------------------------------------------


def ask_process(folder, text: str, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "helpers.ask", "--adapter", str(folder), *more],
        input=text.encode() if isinstance(text, str) else text, capture_output=True, cwd=profiles.ROOT, timeout=300,
    )  # fmt: skip


def test_piped_messages_are_answered_line_by_line(folders, tokenizer, prompts):
    bad = "an end <|endoftext|> inside"
    lines = [prompts[0], "", prompts[1], bad, "   ", prompts[2], "word " * 3000, "last without newline é"]
    process = ask_process(folders["a"], "\n".join(lines), "--batch", "3")
    assert process.returncode == 0, process.stderr
    answers = process.stdout.decode().split("\n")[:-1]
    assert len(answers) == 6  # blank lines are no messages
    assert answers[2] == answers[4] == ""
    errors = [line for line in process.stderr.decode().splitlines() if line.startswith("DataError")]
    assert "contains the end token" in errors[0] and "the model reads 2,000: shorten it" in errors[1] and len(errors) == 2
    model = loading.load_adapter(loading.load_base(TINY), folders["a"], TINY)
    own = prompting.generate(model, tokenizer, [prompts[0], prompts[1]], TINY.max_new_tokens, 100, progress=False)
    assert [" ".join(answer.split()) for answer in own] == answers[:2]


def test_bytes_that_are_not_utf8_do_not_stop_the_loop(folders):
    process = ask_process(folders["a"], b"caf\xe9 au lait\nhello\n", "--batch", "2")
    assert process.returncode == 0 and len(process.stdout.decode().split("\n")) == 3


def test_typed_messages_are_streamed(folders):
    """At a real terminal: the prompt appears, a typed message is answered, Ctrl-D ends."""
    main, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "helpers.ask", "--adapter", str(folders["a"])],
        stdin=child, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=profiles.ROOT,
    )  # fmt: skip
    os.write(main, b"Where is my tea pot?\n\x04")
    out, err = process.communicate(timeout=300)
    os.close(main), os.close(child)
    assert process.returncode == 0, err
    first, second, *_ = out.decode().split("message (Ctrl-D ends)> ")[1:]
    assert len(first.strip()) > 0  # the streamed answer
    assert second.strip() == ""


def test_ask_tells_what_is_wrong_before_the_base_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load_base", lambda *a, **k: pytest.fail("the base was loaded before the adapter was checked"))
    assert ask.main(["--adapter", str(tmp_path / "gone")]) == 1
    assert capsys.readouterr().err.startswith("AdapterError: ")
    assert ask.main(["--adapter", str(tmp_path), "--profile", "nope"]) == 1
    assert capsys.readouterr().err.startswith("ProfileError: there is no profile 'nope'")
    with pytest.raises(SystemExit) as stop:
        ask.main(["--adapter", str(tmp_path), "--batch", "0"])
    assert stop.value.code == 2


def test_a_line_is_answered_before_the_next_one_is_read():
    """What makes it a conversation: with batch 1 the first answer is there while the second line is still awaited."""
    read = []

    def lines():
        for line in ("one", "two", "three"):
            read.append(line)
            yield line

    answers = ask.answer_lines(lines(), lambda group: [f"re: {m}" for m in group], check=lambda message: None)
    assert next(answers) == "re: one" and read == ["one"]
    assert list(answers) == ["re: two", "re: three"]
