"""Template, labels, batches, order, generation, scores."""

import copy

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from helpers import evaluation, prompting, records
from helpers.errors import DataError
from tests.notebooks import load_definitions


def test_encoding_in_batches_is_encoding_one_by_one_and_names_what_is_left_out(tokenizer):
    rows = records.read_tickets("validation")
    tokenizer(["a", "b c d e"], padding=True)  # the tokenizer stays set to pad
    encoded, too_long = prompting.encode(rows, tokenizer, 70)
    lesson = load_definitions("04", "build_prompt", "encode_example")
    lesson["end"] = tokenizer.eos_token_id
    alone = [lesson["encode_example"](tokenizer, r["prompt"], r["answer"]) for r in rows]
    assert 0 < len(too_long) < len(rows)
    assert too_long == [i for i, row in enumerate(alone) if len(row["input_ids"]) > 70]
    assert list(encoded) == [row for i, row in enumerate(alone) if i not in too_long]
    words = r"all 200 given examples are longer than max_length=10 tokens \(the shortest has \d+\)"
    with pytest.raises(DataError, match=words):
        prompting.encode(rows, tokenizer, 10)


def test_a_start_token_begins_the_prompt_and_not_the_answer(tokenizer):
    rows, starting, end = records.read_tickets("test")[:3], copy.deepcopy(tokenizer), prompting.END
    ids = {"single": f"{end} $A", "special_tokens": [(end, tokenizer.eos_token_id)]}
    starting.backend_tokenizer.post_processor = TemplateProcessing(**ids)
    encoded, _ = prompting.encode(Dataset.from_dict(rows), starting, 200)
    plain, _ = prompting.encode(Dataset.from_dict(rows), tokenizer, 200)
    assert encoded["input_ids"] == [[tokenizer.eos_token_id, *ids] for ids in plain["input_ids"]]
    assert encoded["labels"] == [[prompting.IGNORED, *labels] for labels in plain["labels"]]


def test_the_answers_limit_comes_from_the_data(tokenizer):
    rows = [{"prompt": "a", "answer": "word " * 40}, {"prompt": "b", "answer": "c"}]
    encoded, _ = prompting.encode(Dataset.from_list(rows), tokenizer, 500)
    longest = len(tokenizer(" " + "word " * 40)["input_ids"]) + 1
    assert prompting.answer_limit(encoded) == longest + 4 > 48
    assert prompting.cut_off(tokenizer, ["word " * 40, "c"], longest - 1) == 1


def test_length_grouped_order_sees_every_example_once_an_epoch_and_saves_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 100, (1000,), generator=generator).tolist()
    order = prompting.length_grouped_order(lengths, 10, 200, seed=1)
    assert sorted(order[:1000]) == sorted(order[1000:]) == list(range(1000))
    assert order == prompting.length_grouped_order(lengths, 10, 200, seed=1)
    assert order != prompting.length_grouped_order(lengths, 10, 200, seed=2)
    batches = [[lengths[i] for i in order[k : k + 10]] for k in range(0, 2000, 10)]
    assert sum(10 * max(batch) for batch in batches) < 1.1 * 2 * sum(lengths)
    rest = prompting.length_grouped_order([1] * 25, 10, 5, seed=0)  # carried into the next epoch
    assert all(rest.count(i) == 2 for i in range(25))


def test_batched_generation_equals_single_generation(base, tokenizer):
    prompts = ["Hi", *records.read_tickets("test")["prompt"][:30], "Where is order K4821? " * 8]
    together = prompting.generate(base, tokenizer, prompts, 24, 16, progress=False)
    options = {"max_new_tokens": 24, "batch_size": 1, "progress": False}
    assert together == [prompting.generate(base, tokenizer, [p], **options)[0] for p in prompts]
    assert len(set(together)) > 20


TICKET = '{"intent":"refund","product":"desk lamp","order":null,"urgency":"low"}'


def test_score_tickets_counts_each_kind_of_error():
    wrong = [TICKET.replace("low", "high"), "[1]", "no json", TICKET[:-1] + ',"x":1}']
    scores = evaluation.score([TICKET, TICKET.replace(",", ",\n "), *wrong], [TICKET] * 6)
    assert scores["exact_match"] == 2 / 6 and scores["valid_json"] == 3 / 6
    assert scores["fields"] == dict.fromkeys(evaluation.FIELDS, 4 / 6) | {"urgency": 3 / 6}
    with pytest.raises(ValueError, match="argument 2 is longer"):
        evaluation.score(["a"], ["a", "b"])


def test_other_tasks_are_scored_by_exact_match():
    scores = evaluation.score([" Yes.", "No"], ["Yes.", "Yes."])
    assert scores == {"valid_json": None, "exact_match": 0.5, "fields": {}}
