"""Tokenizer, 4-bit base model and the proof that it is 4-bit, LoRA, saved with its card."""

import contextlib
import functools
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import huggingface_hub
import torch
import transformers
from bitsandbytes import functional
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from filelock import FileLock
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import DryRunError, OfflineModeIsEnabled
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.falcon import modeling_falcon

from helpers import memory
from helpers.environment import MEMORY_RAN_OUT, replace_folder, writing
from helpers.errors import ModelError, NotQuantizedError, TutorialError
from helpers.profiles import Profile

FILES = ["*.json", "model*.safetensors"]  # what transformers reads: no pickles, no code
CARD = Path(__file__).parent / "card.md"  # the template of an adapter's README
ADVICE = {  # what an error says: what to do
    "GatedRepo": "accept the model's terms on its page and put your token in HF_TOKEN",
    "Git LFS": "fetch what the pointers stand for with `git lfs pull`",
    "PermissionError": "ask the owner of the files for the right to read them",
    "is quantized": "take the model that is not quantized",
    "No space left": "make room on the disk, or set HF_HOME to a folder on another one",
    "MemoryError": MEMORY_RAN_OUT,
    "allocate memory": MEMORY_RAN_OUT,
    "SafetensorError": "the files are damaged or not fetched: delete them and fetch them again",
    "AdapterError": "give the folder `adapter` of a run, or train it again on this base",
    "no file": "only safetensors are loaded, since pickled weights can run code",
    "": "check name (an adapter's config has that of its base), folder, network and HF_TOKEN",
}


def check_files(folder: str | Path) -> None:
    """OSError or ValueError for files in `folder` that cannot be read, or are Git LFS pointers."""
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".json", ".safetensors"):
            with path.open("rb") as file:
                if file.read(50).startswith(b"version https://git-lfs"):
                    raise ValueError(f"{path.name} is a Git LFS pointer")


@contextlib.contextmanager
def explained(kind: type[TutorialError], what: str, advice: str = "") -> Iterator[None]:
    """An error of this kind, with advice, for whatever goes wrong while `what` is read."""
    try:
        yield
    except (TutorialError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of network, hub, disk, files and peft: no base class in common
        text = f"{kind.__name__} {error!r} {type(error.__cause__).__name__}"
        advice = advice or next(advice for words, advice in ADVICE.items() if words in text)
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise kind(f"{what} cannot be used ({said}): {advice}") from error


@contextlib.contextmanager
def fetching(what: str, profile: Profile) -> Iterator[dict]:
    """Hands out options; ModelError if `what` of the profile's model cannot be fetched or read."""
    with explained(ModelError, f"{what} of {profile.model!r}"):
        if Path(profile.model_path).is_dir():
            check_files(profile.model_path)
        yield {"revision": profile.revision, "trust_remote_code": False}


def load_config(profile: Profile) -> transformers.PretrainedConfig:
    """The config of the profile's model, no weights; ModelError if there is none."""
    with fetching("the config", profile) as options:
        return AutoConfig.from_pretrained(profile.model_path, **options)


def load_tokenizer(profile: Profile):
    """The tokenizer of the profile's model; ModelError if there is none. The end token fills gaps:
    that is safe since labels and attention masks are made from lengths here, never from its id."""
    with fetching("the tokenizer", profile) as options:
        tokenizer = AutoTokenizer.from_pretrained(profile.model_path, **options)
    end, rows = tokenizer.eos_token_id, load_config(profile).get_text_config().vocab_size
    fast = end is not None and getattr(tokenizer, "is_fast", False)
    if not fast or max(end + 1, tokenizer.vocab_size) > rows:
        wrong = f"has no end token, no fast code, or more tokens than the {rows} of the model"
        raise ModelError(f"the tokenizer of {profile.model!r} {wrong}: take one that fits")
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    tokenizer.chat_template = None  # prompting.build_prompt is another, and is what is trained
    return tokenizer


def fetch(profile: Profile) -> None:
    """Download what is not here yet of a hub model; ModelError without safetensors or room."""
    if Path(profile.model_path).is_dir():
        return
    options = {"revision": profile.revision, "allow_patterns": FILES}
    with fetching("the weights", profile):
        try:
            files = snapshot_download(profile.model, dry_run=True, **options)
        except (DryRunError, OfflineModeIsEnabled):  # without network: what is here has to do
            here = snapshot_download(profile.model, local_files_only=True, **options)
            if not any(Path(here).glob("*.safetensors")):
                raise FileNotFoundError("there is no network and they are not here") from None
            return
        if not any(file.filename.endswith(".safetensors") for file in files):
            raise FileNotFoundError("there are no files .safetensors")
        need = sum(file.file_size for file in files if file.will_download)
        cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
        free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
        if need and need + 10**9 > free:  # for tokenizer, adapter and checkpoints: an allowance
            sizes = f"they take {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            raise OSError(f"No space left on the disk: {sizes}")
        snapshot_download(profile.model, **options)


def quantization_config(profile: Profile) -> BitsAndBytesConfig:
    """NF4, double quantization, the profile's compute dtype (the library's default is float32)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=profile.dtype,
    )


def falcon_made_of_plain_linear() -> contextlib.AbstractContextManager:
    """While active, Falcon models are built from `nn.Linear`, which every version quantizes.
    transformers 5.5 and later quantize only layers of exactly this class, and raise no error.
    `FalconLinear` is a subclass with its own spelling of x @ W.T: the model computes the same."""
    return patch.object(modeling_falcon, "FalconLinear", torch.nn.Linear)


def load_base(profile: Profile, device: str | None = None, cache: str | Path | None = None):
    """The profile's base in 4-bit (NF4, double quantization), proven to be so, in eval mode.
    `device`: default the profile's. `cache`: a folder that keeps the 4-bit model, so that it is
    quantized once. ModelError (missing, damaged, incomplete, no room) or NotQuantizedError."""
    source, config, what = profile.model_path, load_config(profile), "the weights"
    options = {"revision": profile.revision, "quantization_config": quantization_config(profile)}
    if cache and not hasattr(config, "quantization_config"):  # else it is quantized already
        stats = [path.stat() for path in sorted(Path(source).glob("*.safetensors"))]
        files = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        commit = getattr(config, "_commit_hash", None)  # of a branch, which moves
        decides = f"{options} {commit} {transformers.__version__} {torch.__version__} {files}"
        digest = hashlib.sha256(decides.encode()).hexdigest()[:12]
        copy = Path(cache).expanduser() / f"{Path(profile.model).name}-4bit-{digest}"
        if not copy.exists():
            with writing(copy), FileLock(f"{copy}.lock"):
                if not copy.exists():  # another process may have made it meanwhile
                    print(f"quantizing {profile.model} and keeping the 4-bit copy as {copy.name}")
                    with replace_folder(copy) as part:
                        load_base(profile, device).save_pretrained(part)
        source, options, what = str(copy), {}, f"the 4-bit copy {copy.name}"
    else:
        fetch(profile)

    def quantize(A, *rest, **settings):  # a GPU's kernel hides a NaN; an infinity is seen below
        return quantize_4bit(A.nan_to_num(torch.inf, torch.inf, -torch.inf), *rest, **settings)

    hiding_no_nan = patch.object(functional, "quantize_4bit", quantize)
    with fetching(what, profile), falcon_made_of_plain_linear(), hiding_no_nan:
        if sum(memory.count_parameters(config).values()) < 10**8:
            transformers.logging.disable_progress_bar()  # it loads in a tenth of a second
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=profile.dtype,
            device_map={"": device or profile.device},
            output_loading_info=True,
            **options,
        )
    if missing := sorted(found["missing_keys"]):
        lacking = f"the weights of {profile.model!r} lack {missing[:3]}, which would be random"
        raise ModelError(f"{lacking}: fetch them again")
    for module in four_bit_layers(model).values():
        # On CPUs with AVX512-BF16, bitsandbytes re-packs a layer's bytes at its first inference and
        # passes no gradient back from then on, even in training. Keep the format that trains.
        module.support_avx512bf16_for_cpu = False
        module.weight.module = None  # they hold each other: a model let go would keep its memory
    prove_4bit(model)
    for name, parameter in model.named_parameters():
        # Of 4 bits the offset tells, the mean of all scales. `isfinite` would copy an embedding
        state = getattr(parameter, "quant_state", None)
        extremes = parameter.aminmax() if state is None else [state.offset]
        if not torch.stack([*extremes]).isfinite().all():
            raise ModelError(f"{name} of {profile.model!r} is not finite: fetch the weights again")
    # What an adapter should say of its base is name and revision, not this machine's folder.
    model.name_or_path = model.config._name_or_path = profile.model
    model.generation_config = transformers.GenerationConfig(eos_token_id=model.config.eos_token_id)
    return model.eval()


def four_bit_layers(model: torch.nn.Module) -> dict[str, Linear4bit]:
    """All `Linear4bit` modules by name, also those inside LoRA layers."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of a base model's weights with their constants, which `get_memory_footprint` leaves
    out: absmax codes, their absmax, the offset; not the two lookup tables, alike in all layers."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        if state := getattr(parameter, "quant_state", None):
            total += state.absmax.nbytes
            total += (state.state2.absmax.nbytes + state.offset.nbytes) if state.nested else 0
    return total


class FourBitProof(NamedTuple):
    """What `prove_4bit` counted."""

    linear4bit_modules: int
    footprint_bytes: int
    footprint_expected_bytes: int


def prove_4bit(model) -> FourBitProof:
    """Hold a model against its config: every linear layer but the head is NF4, and the bytes agree
    within 0.5%. NotQuantizedError if not; ModelError for a weight of another shape."""
    layers, parts, others, _ = memory.skeleton(model.config)
    states = [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None)]
    if len(states) != len(layers):
        wrong = f"{len(states)} of {len(layers)} linear layers are 4-bit"
        raise NotQuantizedError(f"{wrong}: use loading.load_base, on a model that is not quantized")
    if sum(parts["norm"]) > sum(parts["linear"]):  # a mixture of experts, in one tensor a layer
        wrong = "most weights are in no linear layer and stay as they were"
        raise NotQuantizedError(f"{wrong}: take a dense model")
    shapes = [tuple(state.shape) for state in states]
    rest = [p.shape for p in model.parameters() if getattr(p, "quant_state", None) is None]
    if shapes != list(layers.values()) or sorted(rest) != sorted(others):
        raise ModelError("a weight has another shape than by its config: fetch the model again")
    rest_bytes = model.get_output_embeddings().weight.element_size()
    expected, found = memory.expected_footprint(model.config, rest_bytes), stored_bytes(model)
    kinds = {state.quant_type for state in states}
    if abs(found - expected) > 0.005 * expected or kinds != {"nf4"}:  # FP4 has as many bytes
        wrong = f"the model takes {found:,} bytes of {'/'.join(sorted(kinds))}"
        wrong += f" where NF4 with double quantization predicts {expected:,}"
        raise NotQuantizedError(f"{wrong}: check quantization_config")
    return FourBitProof(len(states), found, expected)


def base_fingerprint(model: torch.nn.Module) -> str:
    """sha256 over every 4-bit layer's packed bytes and scales' codes: equal if none changed."""
    digest = hashlib.sha256()
    for module in four_bit_layers(model).values():
        for tensor in (module.weight.data, module.weight.quant_state.absmax):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def attach_lora(model, profile: Profile, seed: int = 0, **options) -> PeftModel:
    """Freeze the base, turn its unquantized rest to float32, and put fresh LoRA adapters (B = 0, A
    drawn from `seed`) on the profile's target modules: for ALL_LINEAR, of any model, all linear
    layers but the head. TutorialError for a name it lacks; `options` go to peft's LoraConfig."""
    targets = memory.targets(model.config, profile.target_modules)
    checkpointing = profile.activation_checkpointing
    model = prepare_model_for_kbit_training(model, checkpointing, {"use_reentrant": False})
    model.config.use_cache = not checkpointing
    transformers.set_seed(seed)
    config = LoraConfig(
        r=profile.lora_r,
        lora_alpha=profile.lora_alpha,
        lora_dropout=profile.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        revision=profile.revision,
        **options,
    )
    model = get_peft_model(model, config)
    # Embeddings are not trained; to find that out itself, peft would ask the hub at every save.
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    return model


def save_adapter(model, folder: str | Path, profile: Profile, record: dict, tokenizer) -> Path:
    """Write adapter, README (of `record`, keys as in results.json) and tokenizer, or nothing."""
    base = None if Path(profile.model_path).is_dir() else profile.model  # the hub knows no folders
    data = ModelCardData(base_model=base, library_name="peft", tags=["lora", "qlora"])
    targets = sorted({n.split(".")[-1] for n in model.peft_config["default"].target_modules})
    facts = {"template_path": CARD, "profile": profile, "record": record, "targets": targets}
    with replace_folder(Path(folder)) as part:
        model.save_pretrained(part, save_embedding_layers=False)
        tokenizer.save_pretrained(part)
        (part / "README.md").write_text(str(ModelCard.from_template(data, **facts)), "utf-8")
    return Path(folder)
