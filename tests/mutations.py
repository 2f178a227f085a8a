"""Plant realistic faults, one at a time, in a copy of the repository, and see that the tests named beside each catch it.

`make mutations` prints the table, one fault on each core at a time; exit status 1 if a fault survives, 2 if none has the name asked for. ARGS="rank seed" tries those
with such a word in their name. A fault is (name, file, text, text with the fault, tests to run).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {number: f"notebooks/{name}.ipynb" for number, name in (("01", "01_lora_math"), ("02", "02_nf4_quantization"))}

FAULTS = [
    # LoRA
    ("alpha/r is r/alpha", NOTEBOOKS["01"], "False), alpha / r, False", "False), r / alpha, False", "test_lora_math.py"),
    ("A transposed at the start", NOTEBOOKS["01"], 'einsum(x, self.A, self.B, "... i, r i, o r -> ... o")', 'einsum(x, self.A.reshape(-1, self.A.shape[0]), self.B, "... i, i r, o r -> ... o")', "test_lora_math.py"),
    ("alpha doubled", "helpers/loading.py", "lora_alpha=profile.lora_alpha,", "lora_alpha=2 * profile.lora_alpha,", "test_helpers.py test_adapters.py"),
    ("adapters on fewer modules", "helpers/loading.py", "list(profile.target_modules)", "list(profile.target_modules)[:3]", "test_helpers.py test_finetune.py"),
    ("adapter seed ignored", "helpers/loading.py", "transformers.set_seed(seed)", "transformers.set_seed(1234)", "test_helpers.py test_finetune.py"),
    # NF4
    ("low nibble first", NOTEBOOKS["02"], "torch.add(codes[:, 1], codes[:, 0], alpha=16", "torch.add(codes[:, 0], codes[:, 1], alpha=16", "test_nf4.py"),
    ("block size 128 for 64", NOTEBOOKS["02"], "def quantize_nf4(w, block_size=64)", "def quantize_nf4(w, block_size=128)", "test_nf4.py"),
    ("x / absmax for x * (1 / absmax)", NOTEBOOKS["02"], "blocks * (1 / scale.clamp(min=1e-38))[:, None]", "blocks / scale.clamp(min=1e-38)[:, None]", "test_nf4.py"),
    ("double quantization without its offset", NOTEBOOKS["02"], "absmax.reshape(-1) - offset", "absmax.reshape(-1)", "test_nf4.py"),
    ("compute dtype left at float32", "helpers/loading.py", ", bnb_4bit_compute_dtype=profile.dtype", "", "test_gpu_profiles.py"),
    ("no double quantization", "helpers/loading.py", "bnb_4bit_use_double_quant=True", "bnb_4bit_use_double_quant=False", "test_helpers.py"),
    ("FP4 for NF4", "helpers/loading.py", 'bnb_4bit_quant_type="nf4"', 'bnb_4bit_quant_type="fp4"', "test_helpers.py"),
    # Falcon
    ("Falcon not repaired", "helpers/loading.py", "modeling_falcon.FalconLinear = torch.nn.Linear", "pass", "test_helpers.py"),
    ("not proven to be 4-bit", "helpers/proof.py", "if len(layers) != expected_layers:", "if False:", "test_bad_input.py"),
    ("remote code trusted", "helpers/loading.py", "path, trust_remote_code=False, use_safetensors", "path, trust_remote_code=True, use_safetensors", "test_security.py"),
    ("pickled weights allowed", "helpers/loading.py", "use_safetensors=True", "use_safetensors=None", "test_quantized_cache.py"),
    ("base's fingerprint blind to the scales", "helpers/proof.py", "(module.weight.data, module.weight.quant_state.absmax)", "(module.weight.data,)", "test_helpers.py test_adapters.py"),
    ("adapter of any base accepted", "helpers/loading.py", "if base != (profile.model, profile.revision):", "if False:", "test_bad_input.py"),
    # prompts and labels
    ("padding not masked", "helpers/prompting.py", '[0] * (width - len(e["input_ids"])) for e', '[1] * (width - len(e["input_ids"])) for e', "test_helpers.py"),
    ("padding learnt", "helpers/prompting.py", 'padded("labels", IGNORED)', 'padded("labels", self.pad_id)', "test_helpers.py"),
    ("end token not in the labels", "helpers/prompting.py", '" " + answer)["input_ids"], tokenizer.eos_token_id]', '" " + answer)["input_ids"]]', "test_helpers.py"),
    ("prompt learnt too", "helpers/prompting.py", '[IGNORED] * len(prompt_ids) + answer_ids', "prompt_ids + answer_ids", "test_helpers.py"),
    ("labels shifted by one", "helpers/prompting.py", '[IGNORED] * len(prompt_ids) + answer_ids', "[IGNORED] * (len(prompt_ids) - 1) + answer_ids + [IGNORED]", "test_helpers.py"),
    ("padded on the right to generate", "helpers/prompting.py", "[[end] * (width - len(ids)) + ids for ids in encoded]", "[ids + [end] * (width - len(ids)) for ids in encoded]", "test_helpers.py test_falcon_inside.py"),
    ("order ignores its seed", "helpers/prompting.py", "manual_seed(seed)", "manual_seed(0)", "test_helpers.py"),
    ("rest of an epoch dropped", "helpers/prompting.py", "waiting = waiting[:full], waiting[full:]", "waiting = waiting[:full], []", "test_helpers.py"),
    ("answers in the order of length", "helpers/prompting.py", "answers[i] = answer", "answers[rows[0] - rows[0] + by_length.index(i)] = answer", "test_helpers.py test_falcon_inside.py"),
    # scores
    ("valid JSON counts as right", "helpers/evaluation.py", "exact += ticket == wanted", "exact += ticket is not None", "test_helpers.py"),
    ("perplexity of the token before", "helpers/evaluation.py", ".logits[:, :-1].float()", ".logits[:, 1:].float()", "test_helpers.py"),
    # training
    ("resumes without the optimizer", "helpers/training.py", "save_total_limit=2,", "save_total_limit=2,\n        save_only_model=True,", "test_finetune.py"),
    ("cut-off checkpoint taken for sound", "helpers/checkpoints.py", "return all(files.sha256(checkpoint / name) == value", "return all(True", "test_helpers.py"),
    ("checkpoint of another run resumed", "helpers/checkpoints.py", '["identity"] != identity', '["identity"] is None', "test_bad_input.py"),
    ("loss that is not a number ignored", "helpers/divergence.py", "if not math.isfinite(loss):", "if False:", "test_bad_input.py"),
    ("gradients that are no numbers are saved", "helpers/divergence.py", "if self.not_finite >= (SKIPPED if args.fp16 else 1):", "if False:", "test_numbers.py"),
    ("a run that has diverged goes on", "helpers/divergence.py", "median(self.shares[:FIRST]) / VANISHED", "0", "test_numbers.py"),
    ("examples without a label go unseen", "helpers/prompting.py", "all(label == IGNORED for label in labels[1:])", "False", "test_numbers.py"),
    ("learning rate of nan accepted", "helpers/profiles.py", "not math.isfinite(value) or", "", "test_numbers.py"),
    ("an error ends with exit status 0", "helpers/command.py", "    return 1\n", "    return 0\n", "test_bad_commands.py"),
    ("steps unchecked", "helpers/command.py", "not least <= int(text) <= most", "False", "test_bad_commands.py"),
    ("memory that runs out called a damaged file", "helpers/loading.py", 'isinstance(error, MemoryError) or "allocate memory" in str(error)', "False", "test_resources.py"),
    ("timeouts not told apart", "helpers/hub.py", 'if "Timeout" in type(cause).__name__:', "if False:", "test_hub.py"),
    ("old adapter deleted before the new one stands", "helpers/files.py", "os.rename(folder, old)", "shutil.rmtree(folder)", "test_interrupts.py"),
    ("results of another adapter left beside the new one", "helpers/files.py", "for path in outdated:", "for path in ():", "test_interrupts.py"),
    ("half-written checkpoints push out sound ones", "helpers/checkpoints.py", "files.discard(checkpoint)", "pass", "test_interrupts.py"),
    ("a T4 gets bfloat16", "helpers/profiles.py", 'compute_dtype="float16"', 'compute_dtype="bfloat16"', "test_helpers.py"),
    # memory, data
    ("plan forgets B", "helpers/shapes.py", "for side in shapes[kind]]", "for side in shapes[kind][:1]]", "test_memory.py"),
    ("test message leaks into training", "data/tickets/train.jsonl", "", "LEAK", "test_data.py"),
    ("guard lets everything out", "tests/guard/sitecustomize.py", "    raise OSError(f\"network guard", "    return\n    raise OSError(f\"network guard", "test_bad_input.py"),
    # keeping and moving models
    ("damaged 4-bit copy used", "helpers/quantized_cache.py", "files.sha256(folder / name) != digest", "False", "test_quantized_cache.py"),
    ("4-bit copy of other versions used", "helpers/quantized_cache.py", '"versions": {name: version(name) for name in DECIDING},', '"versions": {},', "test_quantized_cache.py"),
    ("ties rounded upwards", "helpers/fast_nf4.py", "np.greater(x, bound, out=above)", "np.greater_equal(x, bound, out=above)", "test_fast_nf4.py"),
    ("download not held against its hash", "helpers/hub.py", "if found != blob.name:", "if False:", "test_survive.py"),
    ("token asked for at any error", "helpers/hub.py", "any(isinstance(cause, GatedRepoError) for cause in causes(error))", "True", "test_survive.py"),
    # several processes
    ("each process takes the whole micro-batch", "helpers/processes.py", "micro_batch=profile.micro_batch // rest)", "micro_batch=profile.micro_batch)", "test_beyond.py"),
    ("lost process shows a traceback", "helpers/processes.py", "    if here.size == 1 or threading", "    if True or threading", "test_beyond.py"),
    ("sharded checkpoint of another run resumed", "helpers/sharding.py", 'if saved["identity"] != identity:', "if False:", "test_beyond.py"),
    ("planner adds no gradients under DDP", "helpers/scaling.py", "gradients=2 * whole.gradients)", "gradients=whole.gradients)", "test_beyond.py"),
    # Colab
    ("pip may replace torch", "helpers/environment.py", '"--constraint", str(constraints), ', "", "test_setup_cell.py"),
    ("pip may replace torch, on the emulated Colab", "helpers/environment.py", '"--constraint", str(constraints), ', "", "test_fresh_clone.py"),
    ("a package that is needed is not installed", "helpers/environment.py", '"datasets", "loralib",', '"datasets",', "test_setup_cell.py"),
    ("a package that is needed is not installed, on the emulated Colab", "helpers/environment.py", '"peft", "bitsandbytes", "accelerate"', '"peft", "accelerate"', "test_fresh_clone.py"),
    ("bfloat16 written into a helper", "helpers/loading.py", "bnb_4bit_compute_dtype=profile.dtype", "bnb_4bit_compute_dtype=torch.bfloat16", "test_gpu_profiles.py"),
    ("no loss scaling for float16", "helpers/training.py", 'fp16=profile.compute_dtype == "float16",', "fp16=False,", "test_gpu_profiles.py"),
    # exercises
    ("any number passes an exercise", "helpers/exercises/judging.py", "if math.isclose(value, truth, rel_tol=rel):", "if True:", "test_exercises.py"),
    ("an exercise's tensor is judged by its shape", "helpers/exercises/judging.py", "    if near(truth):", "    if True:", "test_exercises.py"),
    # the study
    ("half a row kept", "helpers/study/rows.py", 'whole, _, cut = text.rpartition("\\n")', 'whole, cut = text.rstrip("\\n"), ""', "test_study.py"),
    ("intervals by the normal distribution", "helpers/study/intervals.py", "t_quantile(len(values) - 1) *", "1.96 *", "test_study.py"),
]  # fmt: skip


def plant(folder: Path, file: str, text: str, fault: str) -> None:
    """Replace the one place where `text` stands; LookupError if it stands nowhere or more than once."""
    path = folder / file
    content = path.read_text(encoding="utf-8")
    if fault == "LEAK":
        test = path.with_name("test.jsonl").read_text(encoding="utf-8").splitlines()[0]
        path.write_text(content + test + "\n", encoding="utf-8")
        return
    if path.suffix == ".ipynb":  # as it stands in a JSON string
        text, fault = json.dumps(text)[1:-1], json.dumps(fault)[1:-1]
    if content.count(text) != 1:
        raise LookupError(f"{text!r} stands {content.count(text)} times in {file}: name a text that stands once")
    path.write_text(content.replace(text, fault), encoding="utf-8")


def commit(folder: Path) -> None:
    """Make the copy a repository: what the emulated Colab fetches is a commit."""
    author = ("-c", "user.name=mutations", "-c", "user.email=mutations@localhost")
    for command in (("init", "--quiet"), ("add", "--all"), (*author, "commit", "--quiet", "--message", "a planted fault")):
        subprocess.run(["git", *command], cwd=folder, check=True)


def caught(folder: Path, tests: str) -> bool:
    """Whether one of the test files fails (an error while collecting does not count)."""
    environment = os.environ | {
        "PYTHONPATH": str(folder / "tests" / "guard"),
        "QLORA_PROFILE": "tiny",
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests.split())]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode > 1:
        raise RuntimeError(f"the tests could not run:\n{done.stdout[-1500:]}")
    return done.returncode == 1


def tried(files: list[str], name: str, file: str, text: str, fault: str, tests: str) -> tuple[str, str, bool, float]:
    """Plant one fault in a copy of `files` and run `tests` there: name, tests, whether it was caught, seconds."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for each in files:
            (folder / each).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / each, folder / each)
        plant(folder, file, text, fault)
        commit(folder)
        began = time.monotonic()
        return name, tests, caught(folder, tests), time.monotonic() - began


def main(chosen: list[str]) -> int:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    faults = [fault for fault in FAULTS if not chosen or any(word in fault[0] for word in chosen)]
    if not faults:
        print(
            f"no fault is called {' or '.join(map(repr, chosen))}: give words of {', '.join(fault[0] for fault in FAULTS)}",
            file=sys.stderr,
        )
        return 2
    survivors = []
    with ThreadPoolExecutor(os.cpu_count()) as cores:
        results = as_completed([cores.submit(tried, files, *fault) for fault in faults])
        for name, tests, found, seconds in (result.result() for result in tqdm(results, desc="faults", total=len(faults))):
            tqdm.write(f"{name:<66}{'caught' if found else 'SURVIVED':<10}{seconds:>5.0f} s  {tests}")
            survivors += [] if found else [name]
    print(f"{len(faults) - len(survivors)} of {len(faults)} faults caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
