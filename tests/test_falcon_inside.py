"""What notebook 04 says of Falcon: causality, the block by hand, rotary positions, generation."""

import pytest
import torch
from transformers import FalconForCausalLM
from transformers.models.falcon import modeling_falcon

from helpers import memory, profiles, prompting, records
from tests.notebooks import load_definitions


@pytest.fixture(scope="module")
def lesson():
    return load_definitions("04", "rotary", "falcon_block")


@pytest.fixture(scope="module")
def random_falcon():
    """Falcon-7b's structure, small, with random weights large enough that every part matters."""
    torch.manual_seed(0)
    config = memory.known_config(profiles.FALCON_7B)
    small = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 2, "vocab_size": 64}
    config.update(small | {"ffn_hidden_size": 768})
    model = FalconForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_ids(base, *shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, base.config.vocab_size, shape, generator=generator)


def test_a_later_token_changes_no_earlier_logit(base):
    ids = random_ids(base, 1, 24)
    for at in range(1, 24):
        changed = ids.clone()
        changed[0, at] = (changed[0, at] + 7) % base.config.vocab_size
        with torch.no_grad():
            before, after = base(input_ids=ids).logits[0], base(input_ids=changed).logits[0]
        torch.testing.assert_close(before[:at], after[:at], atol=1e-5, rtol=1e-5)
        assert (before[at:] - after[at:]).abs().amax(-1).min() > 1e-3  # every later one moves


def run_layer(model, layer, x):
    """FalconDecoderLayer called as the model calls it: rotary tables and a causal mask to add."""
    tokens = x.shape[1]
    mask = torch.full((tokens, tokens), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)[None, None]
    positions = model.transformer.rotary_emb(x, torch.arange(tokens)[None])
    return layer(x, alibi=None, attention_mask=mask, position_embeddings=positions)[0]


def test_hand_written_block_equals_the_decoder_layer(lesson, random_falcon):
    layer = random_falcon.transformer.h[0]
    assert isinstance(layer, modeling_falcon.FalconDecoderLayer)
    x = random(2, 17, 192, seed=1, dtype=torch.float64)
    with torch.no_grad():
        wanted = run_layer(random_falcon, layer, x)
        torch.testing.assert_close(lesson["falcon_block"](layer, x), wanted, atol=1e-5, rtol=1e-5)
        for part in (layer.self_attention.dense, layer.mlp.dense_4h_to_h, layer.input_layernorm):
            kept = part.weight.clone()
            part.weight.zero_()  # no part may be left out: without it the result is another
            assert (lesson["falcon_block"](layer, x) - wanted).abs().max() > 1e-2
            part.weight.copy_(kept)


def test_hand_written_block_equals_the_4bit_layers(lesson, base):
    ids = random_ids(base, 2, 30)
    with torch.no_grad():
        hidden = base(input_ids=ids, output_hidden_states=True).hidden_states
        for i, layer in enumerate(base.transformer.h[:-1]):
            found = lesson["falcon_block"](layer, hidden[i])
            torch.testing.assert_close(found, hidden[i + 1], atol=1e-4, rtol=1e-4)


def test_rotary_equals_the_library(lesson, random_falcon):
    x = random(2, 3, 40, 64)
    cos, sin = random_falcon.transformer.rotary_emb(x, torch.arange(40)[None])
    wanted, _ = modeling_falcon.apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(lesson["rotary"](x), wanted, atol=1e-5, rtol=1e-5)


def test_rotary_dot_products_depend_on_the_distance_alone(lesson):
    q, k = (random(64, seed=seed, dtype=torch.float64).expand(200, 64) for seed in range(2))
    scores = lesson["rotary"](q) @ lesson["rotary"](k).T
    for distance in (0, 1, 5, 100):
        same = scores.diagonal(-distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), atol=1e-3, rtol=0)
    assert (scores[:, 0] - scores[0, 0]).abs().max() > 1  # and they do depend on it


def test_the_cache_holds_one_key_and_value_head(base):
    with torch.no_grad():
        cache = base(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    assert base.config.num_attention_heads > 1
    assert {tuple(layer.keys.shape) for layer in cache.layers} == {(1, 1, 3, 64)}


def test_one_batch_of_mixed_lengths_answers_as_each_prompt_alone(base, tokenizer):
    prompts = ["Hi", *records.read_tickets("test")["prompt"][:50], "Where is order K4821? " * 8]
    together = prompting.generate_batch(base, tokenizer, prompts, 24)
    alone = [prompting.generate_batch(base, tokenizer, [prompt], 24)[0] for prompt in prompts]
    assert together == alone and len(set(together)) > 20


def test_generated_ids_end_with_the_end_token_or_at_the_limit(base, tokenizer):
    prompts = records.read_tickets("test")["prompt"][:8]
    full = prompting.generate_ids(base, tokenizer, prompts, 48)
    assert all(tokenizer.eos_token_id not in ids[:-1] for ids in full)
    assert all(ids[-1] == tokenizer.eos_token_id or len(ids) == 48 for ids in full)
    assert [ids[:5] for ids in full] == prompting.generate_ids(base, tokenizer, prompts, 5)


def test_generate_leaves_the_model_as_it_was_even_after_an_error(base, tokenizer):
    base.train()
    base.config.use_cache = False

    def run_out_of_memory(*_):
        assert not base.training
        raise RuntimeError("out of memory")

    hook = base.lm_head.register_forward_pre_hook(run_out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        prompting.generate(base, tokenizer, ["hello"], 4, 1, progress=False)
    hook.remove()
    assert base.training
    assert base.config.use_cache is False
    assert prompting.generate(base, tokenizer, [], 4, 1, progress=False) == []
