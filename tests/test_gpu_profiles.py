"""The GPU profiles without a GPU: what each card gets, whether it fits, and that a T4, which has no bfloat16, meets none anywhere."""

import ast
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import gpus, loading, memory, profiles, prompting, training
from tests.notebooks import ROOT


@dataclasses.dataclass
class Card:
    """What torch.cuda.get_device_properties tells of a card."""

    name: str
    total_memory: int
    major: int
    minor: int


T4 = Card("Tesla T4", gpus.capacity("T4"), 7, 5)
# card, its profile, compute dtype, micro-batch, accumulation; None: no 7B profile is made for it
CARDS = [
    (T4, "colab-t4", "float16", 4, 4),
    (Card("NVIDIA L4", gpus.capacity("L4"), 8, 9), "colab-l4", "bfloat16", 8, 2),
    (Card("NVIDIA A100-SXM4-40GB", gpus.capacity("A100-40GB"), 8, 0), "colab-a100", "bfloat16", 16, 1),
    (Card("NVIDIA A100-SXM4-80GB", gpus.capacity("A100-80GB"), 8, 0), "colab-a100", "bfloat16", 16, 1),
    (Card("NVIDIA H100 80GB HBM3", gpus.capacity("H100-80GB"), 9, 0), "colab-a100", "bfloat16", 16, 1),
    (Card("NVIDIA GeForce RTX 3060", gpus.capacity("RTX 3060"), 8, 6), "tiny", "float32", 16, 1),
]
by_card = pytest.mark.parametrize(("card", "name", "dtype", "batch", "accumulation"), CARDS, ids=[row[0].name for row in CARDS])


@pytest.fixture
def insert(monkeypatch):
    """Put a card into this machine, as far as helpers.profiles can see. The variable of the tests is taken out: hardware decides."""

    def put(card: Card) -> None:
        monkeypatch.delenv("QLORA_PROFILE", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)

    return put


@by_card
def test_each_card_gets_its_profile(insert, monkeypatch, tmp_path, card, name, dtype, batch, accumulation):
    insert(card)
    profile = profiles.resolve()
    assert (profile.name, profile.compute_dtype) == (name, dtype)
    assert (profile.micro_batch, profile.accumulation) == (batch, accumulation)
    assert profile.micro_batch * profile.accumulation == 16  # so that every profile takes the same steps
    assert profile.activation_checkpointing == (profile.device == "cuda")
    assert profile.optimizer == "paged_adamw_8bit"

    monkeypatch.setattr(training, "TrainingArguments", dict)  # the arguments as given: constructing them would touch the card
    arguments = training.training_arguments(profile, tmp_path, seed=0)
    assert arguments["fp16"] == (dtype == "float16")  # brings autocast to float16 and torch's GradScaler
    assert arguments["bf16"] == (dtype == "bfloat16")
    assert arguments["optim"] == profile.optimizer
    assert (arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]) == (batch, accumulation)
    assert loading.quantization_config(profile).bnb_4bit_compute_dtype == getattr(torch, dtype)


@by_card
def test_what_a_card_gets_fits_in_92_percent_of_it(insert, card, name, dtype, batch, accumulation):
    insert(card)
    profile = profiles.resolve()
    plan = memory.plan(memory.known_config(profile.model), profile)
    assert plan.total <= 0.92 * card.total_memory
    assert profile.gpu_bytes <= 1.07 * card.total_memory


def test_every_gpu_profile_is_some_cards():
    assert {row[1] for row in CARDS} >= {profile.name for profile in profiles.PROFILES.values() if profile.gpu_bytes}


def test_attention_is_the_fused_one(base):
    """`load_base` asks for sdpa, which every card has; what T4s lack (flash attention 2) is never asked for."""
    assert base.config._attn_implementation == "sdpa"


# --- no bfloat16 on a T4 ----------------------------------------------------------------------------------------------------


class Dtypes(TorchDispatchMode):
    """Notes the floating-point dtype of every tensor that any operation reads or makes while active."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.seen |= {x.dtype for x in tree_leaves((arguments, options, result)) if isinstance(x, torch.Tensor)}
        return result


def stored_dtypes(model) -> set[torch.dtype]:
    """The dtypes of all parameters, buffers and quantization constants."""
    found = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    for layer in loading.four_bit_layers(model).values():
        state = layer.weight.quant_state
        found |= {layer.compute_dtype, state.dtype, state.absmax.dtype, state.state2.absmax.dtype, state.offset.dtype}
    return found


@pytest.fixture(scope="module")
def on_a_t4():
    """The tiny Falcon under everything that the T4 profile says of dtypes, checkpointing and adapters."""
    t4, tiny = profiles.PROFILES["colab-t4"], profiles.PROFILES["tiny"]
    return dataclasses.replace(
        t4,
        name="t4-on-cpu",
        model=tiny.model,
        revision=None,
        gpu_bytes=0,
        max_length=tiny.max_length,
        micro_batch=4,
        accumulation=1,
    )


def test_a_t4_stores_computes_trains_and_generates_without_bfloat16(on_a_t4, tokenizer):
    model = loading.load_base(on_a_t4, device="cpu")  # the file holds bfloat16, as Falcon-7b's does: read, cast, and no more seen
    assert stored_dtypes(model) == {torch.float16, torch.float32, torch.uint8}
    with Dtypes() as generating:
        prompting.generate(model, tokenizer, ["Where is my order?", "hello"], 4, 2, progress=False)
    assert torch.float16 in generating.seen
    with Dtypes() as preparing:
        model = loading.attach_lora(model, on_a_t4).train()  # prepare_model_for_kbit_training casts norms and embedding
    assert stored_dtypes(model) == {torch.float16, torch.float32, torch.uint8}  # float16 is what 4-bit weights are dequantized to
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "layernorm" in n or "ln_" in n} == {torch.float32}
    ids = torch.randint(5, 500, (2, 16))
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    with Dtypes() as stepping:
        with torch.autocast("cpu", dtype=on_a_t4.dtype):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert torch.isfinite(loss)
    with Dtypes() as answering:
        prompting.generate(model, tokenizer, ["Where is my order?"], 4, 1, progress=False)
    for name, phase in {"prepare": preparing, "generate": generating, "step": stepping, "answer": answering}.items():
        assert phase.seen and torch.bfloat16 not in phase.seen, name


def test_the_watch_sees_bfloat16_where_it_is(on_a_t4, tokenizer):
    """The same model with only the compute dtype of its 4-bit layers in bfloat16, as a default might leave it."""
    model = loading.load_base(on_a_t4, device="cpu")
    for layer in loading.four_bit_layers(model).values():
        layer.compute_dtype = torch.bfloat16
    with Dtypes() as generating:
        prompting.generate(model, tokenizer, ["hello"], 1, 1, progress=False)
    assert torch.bfloat16 in generating.seen
    assert torch.bfloat16 in stored_dtypes(model)


# Where a helper may say bfloat16, how often and why. Anything more would be a dtype that a T4 does not have, chosen in passing.
MAY_NAME_IT = {
    "profiles.py": 6,  # the dtypes there are, three profiles of cards that have it (and the CPU's), two checks that the card does
    "memory.py": 1,  # the planner's profile of any card but a T4
    "training.py": 1,  # on if the profile says so
    "fast_nf4.py": 1,  # reads files stored in it
    "random_checkpoint.py": 2,  # writes a file as Falcon's are stored
    "weights.py": 2,  # names of dtypes in file headers
}


def mentions(path) -> list[str]:
    """Every literal of a module that names bfloat16: torch.bfloat16, x.bfloat16(), "bfloat16", "bf16"; not prose."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        literal = isinstance(node, ast.Constant) and str(node.value).lower() in ("bfloat16", "bf16")
        if literal or (isinstance(node, ast.Attribute) and node.attr == "bfloat16"):
            found.append(f"{path.name}:{node.lineno}")
    return found


# Not helpers/study: it compares formats on the tiny Falcon, bfloat16 among them, and takes no profile of a card.
@pytest.mark.parametrize("path", sorted((ROOT / "helpers").glob("*.py")), ids=lambda p: p.name)
def test_helpers_name_bfloat16_only_where_the_profile_decides(path):
    found = mentions(path)
    assert len(found) <= MAY_NAME_IT.get(path.name, 0), f"{found}: take the dtype from the profile (profile.dtype)"
