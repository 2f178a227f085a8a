"""Falcon's block as notebook 04 writes it by hand, and generation."""

import pytest
import torch
from transformers import FalconForCausalLM
from transformers.models.falcon import modeling_falcon

from helpers import memory, profiles, prompting, records
from tests.notebooks import load_definitions


def test_hand_written_block_equals_the_decoder_layer():
    """Of Falcon-7b's structure, small, with random weights so large that every part matters."""
    falcon_block = load_definitions("04", "rotary", "falcon_block")["falcon_block"]
    torch.manual_seed(0)
    config = memory.known_config(profiles.FALCON_7B)
    small = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 2, "vocab_size": 64}
    config.update(small | {"ffn_hidden_size": 768})
    model, ids = FalconForCausalLM(config).double().eval(), torch.arange(34).view(2, 17)
    layer = model.transformer.h[0]
    assert isinstance(layer, modeling_falcon.FalconDecoderLayer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        x, wanted, _ = model(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(falcon_block(layer, x), wanted, atol=1e-5, rtol=1e-5)
        for part in (layer.self_attention.dense, layer.mlp.dense_4h_to_h, layer.input_layernorm):
            kept = part.weight.clone()
            part.weight.zero_()  # no part may be left out: without it the result is another
            assert (falcon_block(layer, x) - wanted).abs().max() > 1e-2
            part.weight.copy_(kept)


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
    assert base.training and base.config.use_cache is False
    assert prompting.generate(base, tokenizer, [], 4, 1, progress=False) == []
