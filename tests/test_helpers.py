"""Unit tests of the helpers that need no training."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import FalconConfig, FalconForCausalLM, TrainerState
from transformers.models.falcon import modeling_falcon

from helpers import checkpoints, evaluation, loading, memory, profiles, prompting, records, results, setup, training
from helpers.errors import NotQuantizedError
from tests.notebooks import ROOT

# --- memory -----------------------------------------------------------------------------------------------------------------


def test_falcon_7b_is_counted_as_on_the_hub():
    falcon = memory.known_config(profiles.FALCON_7B)
    assert sum(memory.count_parameters(falcon).values()) == 6_921_720_704
    assert memory.adapter_parameters(falcon, 16, ("query_key_value",)) == 4_718_592
    assert memory.adapter_parameters(falcon, 64, profiles.ALL_LINEAR) == 130_547_712


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"multi_query": False},
        {"bias": True},
        {"parallel_attn": False},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"tie_word_embeddings": False},
    ],
)
def test_parameter_count_equals_the_real_model(changes):
    config = FalconConfig(
        **{"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 128, "alibi": False, **changes}
    )
    with torch.device("meta"):
        model = FalconForCausalLM(config)
    assert sum(memory.count_parameters(config).values()) == model.num_parameters()


def test_a_card_that_is_meant_for_a_profile_fits_its_plan():
    for profile in profiles.PROFILES.values():
        if profile.gpu_bytes:
            plan = memory.plan(memory.known_config(profile.model), profile)
            assert plan.total < 0.92 * profile.gpu_bytes, (profile.name, plan)


# --- loading ----------------------------------------------------------------------------------------------------------------


def test_load_base_is_4bit_and_leaves_transformers_as_it_was(base):
    proof = loading.prove_4bit(base)
    assert proof.linear4bit_modules == 4 * base.config.num_hidden_layers
    assert abs(proof.footprint_bytes / proof.footprint_expected_bytes - 1) < 0.005
    assert modeling_falcon.FalconLinear is not torch.nn.Linear


def test_fp4_is_not_taken_for_nf4(tiny, monkeypatch):
    """It has as many layers and bytes, and larger errors."""
    config = loading.quantization_config(tiny)
    config.bnb_4bit_quant_type = "fp4"
    monkeypatch.setattr(loading, "quantization_config", lambda profile: config)
    with pytest.raises(NotQuantizedError, match="layer .* holds 'fp4' codes where NF4 was asked for: check quantization_config"):
        loading.load_base(tiny)


def test_the_fingerprint_sees_every_packed_byte_and_every_scale(base):
    """A block's scale that changed is another base, though its packed bytes are the same."""
    before, layer = loading.base_fingerprint(base), base.transformer.h[-1].mlp.dense_4h_to_h
    for stored in (layer.weight.data.view(-1), layer.weight.quant_state.absmax.view(-1)):
        stored[-1] ^= 1
        assert loading.base_fingerprint(base) != before
        stored[-1] ^= 1
    assert loading.base_fingerprint(base) == before


def test_4bit_logits_are_near_the_16bit_models(base, tiny, tokenizer):
    full = FalconForCausalLM.from_pretrained(tiny.model_path, dtype=torch.float32)
    ids = tokenizer("Call me Ishmael. Some years ago, never mind how long", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        a, b = full(ids).logits.log_softmax(-1), base(ids).logits.log_softmax(-1)
    assert torch.nn.functional.kl_div(b, a, log_target=True, reduction="batchmean") / ids.shape[1] < 0.2


def test_inference_changes_no_byte_and_gradients_still_flow(base, tiny, tokenizer):
    """bitsandbytes' inference format for some CPUs would re-pack the bytes and cut the gradient: load_base switches it off."""
    before = loading.base_fingerprint(base)
    prompting.generate(base, tokenizer, ["hello"], 4, 1, progress=False)
    assert loading.base_fingerprint(base) == before
    model = loading.attach_lora(base, tiny).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    # B is zero, so A has no gradient yet; every B has one, also in the first layer, which only a gradient through 4-bit layers reaches
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_falcon_7b_shapes_load_in_4bit_on_the_same_path(tmp_path, tiny):
    """A random-weight model of Falcon-7b's exact shapes, cut to 2 layers and a small vocabulary, through load_base and one step."""
    config = memory.known_config(profiles.FALCON_7B)
    config.num_hidden_layers, config.vocab_size = 2, 512
    with torch.device("cpu"):
        FalconForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    profile = dataclasses.replace(profiles.PROFILES["cpu-7b"], model=str(tmp_path), revision=None)
    model = loading.load_base(profile)
    assert loading.prove_4bit(model).linear4bit_modules == 8
    assert model.lm_head.weight.dtype == torch.bfloat16
    model = loading.attach_lora(model, profile).train()
    assert loading.trainable_parameters(model) == memory.adapter_parameters(config, profile.lora_r, profile.target_modules)
    ids = torch.randint(512, (1, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_repair_is_skipped_where_transformers_needs_none(monkeypatch):
    monkeypatch.setattr(loading, "quantizes_falcon", lambda: True)
    with loading.falcon_made_of_plain_linear():
        assert modeling_falcon.FalconLinear is not torch.nn.Linear


def test_adapter_round_trip(base, tiny, tokenizer, tmp_path):
    model = loading.attach_lora(base, tiny, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    ids = torch.tensor([[5, 6, 7, 8]])
    model.eval()
    wanted = model(input_ids=ids).logits
    folder = loading.save_adapter(model, tmp_path / "adapter")
    assert "/" not in json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"].removeprefix("data/")
    again = loading.load_adapter(loading.load_base(tiny), folder, tiny)
    assert torch.equal(again(input_ids=ids).logits, wanted)


# --- prompting --------------------------------------------------------------------------------------------------------------


def test_labels_are_the_answer_and_the_end_token(tokenizer):
    example = prompting.encode_example(tokenizer, "Where is it?", "Here.")
    learned = [label for label in example["labels"] if label != prompting.IGNORED]
    assert learned == tokenizer(" Here.")["input_ids"] + [tokenizer.eos_token_id]
    assert example["input_ids"][-len(learned) :] == learned
    assert (
        example["labels"] == [prompting.IGNORED] * (len(example["input_ids"]) - len(learned)) + learned
    )  # each in its token's place
    assert tokenizer.decode(example["input_ids"]) == "User: Where is it?\nAssistant: Here." + tokenizer.eos_token


def test_collator_masks_padding_and_keeps_the_end_tokens_label(tokenizer):
    end = tokenizer.eos_token_id
    batch = prompting.Collator(end)(
        [{"input_ids": [5, 6, end], "labels": [-100, 6, end]}, {"input_ids": [7, end], "labels": [7, end]}]
    )
    assert batch["input_ids"].tolist() == [[5, 6, end], [7, end, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, end], [7, end, -100]]


def test_padding_changes_no_loss(base, tokenizer):
    rows = [
        prompting.encode_example(tokenizer, p, "Yes, of course.")
        for p in ("Hi", "Is the desk lamp with order K4821 on its way to me?")
    ]
    collate = prompting.Collator(tokenizer.eos_token_id)
    with torch.no_grad():
        together = base(**collate(rows)).logits
        alone = base(**collate(rows[:1])).logits
    torch.testing.assert_close(together[0, : alone.shape[1]], alone[0], atol=1e-4, rtol=1e-4)


def test_length_grouped_order_sees_every_example_once_an_epoch_and_saves_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 100, (1000,), generator=generator).tolist()
    order = prompting.length_grouped_order(lengths, 10, 200, seed=1)
    assert len(order) == 2000
    assert sorted(order[:1000]) == sorted(order[1000:]) == list(range(1000))
    assert (
        order
        == prompting.length_grouped_order(lengths, 10, 200, seed=1)
        != prompting.length_grouped_order(lengths, 10, 200, seed=2)
    )
    batches = [[lengths[i] for i in order[k : k + 10]] for k in range(0, 2000, 10)]
    padded = sum(10 * max(batch) for batch in batches)
    assert padded < 1.1 * 2 * sum(lengths)


def test_length_grouped_order_carries_the_rest_of_an_epoch_over():
    order = prompting.length_grouped_order([1] * 25, 10, 5, seed=0)
    assert len(order) == 50
    assert all(order.count(i) == 2 for i in range(25))


def test_batched_generation_equals_single_generation(base, tokenizer):
    prompts = records.read_tickets("test")["prompt"][:50]
    together = prompting.generate(base, tokenizer, prompts, 24, 16, progress=False)
    alone = [prompting.generate(base, tokenizer, [prompt], 24, 1, progress=False)[0] for prompt in prompts]  # no order to mix up
    assert together == alone


# --- evaluation -------------------------------------------------------------------------------------------------------------

TICKET = '{"intent":"refund","product":"desk lamp","order":"K4821","urgency":"low"}'


def test_score_tickets_counts_each_kind_of_error():
    wrong_field = TICKET.replace("low", "high")
    spaced = json.dumps(json.loads(TICKET), indent=1)
    scores = evaluation.score_tickets([TICKET, spaced, wrong_field, "[1]", "no json", TICKET[:-1] + ',"x":1}'], [TICKET] * 6)
    assert scores["exact_match"] == 2 / 6
    assert scores["valid_json"] == 3 / 6
    assert scores["fields"] == {"intent": 4 / 6, "product": 4 / 6, "order": 4 / 6, "urgency": 3 / 6}


def test_other_tasks_are_scored_by_exact_match():
    assert evaluation.score([" Yes.", "No"], ["Yes.", "Yes."]) == {"valid_json": None, "exact_match": 0.5, "fields": {}}


def test_perplexity_is_the_exponential_of_the_models_own_loss(base, tokenizer):
    text = (ROOT / "data" / "heldout.txt").read_text()[:3000]
    ids = torch.tensor(tokenizer(text)["input_ids"][: 4 * 128]).view(4, 128)
    with torch.no_grad():
        loss = base(input_ids=ids, labels=ids).loss
    assert evaluation.perplexity(base, tokenizer, text, max_tokens=4 * 128) == pytest.approx(loss.exp().item(), rel=1e-4)


# --- profiles, records, results -----------------------------------------------------------------------------------------------


class Card:
    def __init__(self, name, gigabytes, major):
        self.name, self.total_memory, self.major, self.minor = name, int(gigabytes * 1e9), major, 0


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (Card("Tesla T4", 15.8, 7), "colab-t4"),
        (Card("NVIDIA L4", 23.7, 8), "colab-l4"),
        (Card("NVIDIA A100-SXM4-40GB", 42.4, 8), "colab-a100"),
        (Card("NVIDIA A100-SXM4-80GB", 85.1, 8), "colab-a100"),
        (Card("Tesla V100-SXM2-32GB", 34.1, 7), "colab-t4"),
        (Card("GeForce RTX 3060", 12.6, 8), "tiny"),
    ],
)
def test_detection_by_card(monkeypatch, card, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    profile = profiles.resolve("auto")
    assert profile.name == expected
    if card.major < 8:
        assert profile.compute_dtype != "bfloat16"


def test_environment_overrides_detection(monkeypatch):
    monkeypatch.setenv("QLORA_PROFILE", "cpu-7b")
    assert profiles.resolve().name == "cpu-7b"
    assert profiles.resolve("tiny").name == "tiny"


def test_float16_profiles_scale_the_loss_and_bfloat16_ones_do_not(tmp_path, monkeypatch):
    arguments = training.training_arguments(profiles.PROFILES["tiny"], tmp_path, 0)
    assert (arguments.fp16, arguments.bf16, arguments.use_cpu) == (False, False, True)
    assert arguments.optim == "paged_adamw_8bit"


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_files_of_every_kind_read_the_same(tmp_path, ending):
    rows = Dataset.from_list([{"q": "a, b?", "a": 'x "y"'}, {"q": "é\u2028z", "a": "1"}])
    path = tmp_path / f"data.{ending}"
    {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[ending](str(path))
    read = records.read_records(path, "q", "a")
    assert read["prompt"] == rows["q"]
    assert read["answer"] == rows["a"]


def test_split_records_is_disjoint_and_seeded():
    data = Dataset.from_list([{"prompt": str(i), "answer": "x"} for i in range(50)])
    train, test = records.split_records(data)
    assert len(test) == 5
    assert sorted([*train["prompt"], *test["prompt"]], key=int) == data["prompt"][:]
    assert records.split_records(data)[1]["prompt"][:] == test["prompt"][:]


def test_versions_and_peak_memory_are_real():
    assert results.versions()["transformers"] == transformers.__version__
    assert results.peak_rss() > 100e6


def test_peak_memory_of_a_child_is_not_its_parents():
    held = b"x" * 10**9
    code = "import sys; sys.path.insert(0, sys.argv[1]); from helpers import results; print(results.peak_rss())"
    # a forked child, as Jupyter starts kernels, shares the parent's pages until it becomes another program
    child = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True, preexec_fn=lambda: None
    )
    assert int(child.stdout) < results.peak_rss() - len(held) / 2


def test_setup_prints_profile_and_versions(capsys):
    setup.show_setup()
    shown = capsys.readouterr().out
    assert "profile       tiny" in shown
    assert transformers.__version__ in shown


def test_a_checkpoint_is_sound_only_whole(tmp_path):
    folder = tmp_path / "checkpoints" / "checkpoint-5"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    arguments = type("Arguments", (), {"output_dir": str(tmp_path / "checkpoints")})
    state = TrainerState(global_step=5)
    assert checkpoints.newest_checkpoint(tmp_path, "me") is None  # no marker yet: as if the save had been cut off
    checkpoints.SoundCheckpoints("me").on_save(arguments, state, None)
    assert checkpoints.newest_checkpoint(tmp_path, "me") == folder
    (folder / "weights").write_bytes(b"1234")
    assert checkpoints.newest_checkpoint(tmp_path, "me") is None
