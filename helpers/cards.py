"""The model card of an adapter: what it was made from and how good it is, taken from the record of its run. Imports files, profiles."""

import json
from pathlib import Path

from helpers import files
from helpers.profiles import Profile


def adapter_card(profile: Profile, record: dict, config: dict, describes: str, data: str, example: tuple[str, str]) -> str:
    """The card as Markdown. `record` is results.json, `config` adapter_config.json, `describes` completes "turns ...", `data` names the
    training data and its licence, `example` is a message and the adapter's answer to it.

    The YAML block at the top is what the hub reads: https://huggingface.co/docs/hub/model-cards.
    """
    batch = profile.micro_batch * profile.accumulation
    facts = {
        "base model": f"`{record['model']}`",
        "base revision": f"`{record['revision']}`"
        if record["revision"]
        else "a folder of the repository that trained the adapter",
        "base weights": f"{record['linear4bit_modules']} layers in NF4 with double quantization",
        "training data": data,
        "LoRA": f"r = {config['r']}, alpha = {config['lora_alpha']}, on {', '.join(sorted(config['target_modules']))}",
        "trainable parameters": f"{record['parameters_trainable']:,} of {record['parameters_total']:,}",
        "training": f"{record['steps']} steps of {batch} examples, seed {record['seed']}, final loss {record['final_loss']:.4f} nats a token",
        "optimizer": f"{profile.optimizer}, learning rate {profile.learning_rate:g}, {profile.warmup_steps} warm-up steps, then cosine",
        "compute dtype": profile.compute_dtype,
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    }
    after = record["after"]
    scores = {name: value for name, value in after.items() if isinstance(value, float)} | after["fields"]
    message, answer = example
    lines = [
        "---",
        f"base_model: {record['model']}",
        "base_model_relation: adapter",
        "library_name: peft",
        "license: apache-2.0",
        "pipeline_tag: text-generation",
        "tags: [lora, qlora, falcon]",
        "---",
        f"# An adapter that turns {describes}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
        "## Score on the test split",
        "",
        "| score | share of messages |",
        "|---|---|",
        *(f"| {name.replace('_', ' ')} | {value:.3f} |" for name, value in scores.items()),
        "",
        "## Use",
        "",
        "The prompt is `User: MESSAGE`, a new line, and `Assistant:`. For example:",
        "",
        "```",
        f"User: {message}",
        f"Assistant: {answer}",
        "```",
        "",
        "Load the base in 4-bit, then `PeftModel.from_pretrained(base, folder)`. Weights are in safetensors only.",
        "",
        "It has seen messages of one kind, in one language. Check its answers before anything is done with them.",
        "",
    ]
    return "\n".join(lines)


def write_card(folder: Path, profile: Profile, record: dict, describes: str, data: str, example: tuple[str, str]) -> str:
    """Write the card as README.md of an adapter's folder, in place of peft's empty template, and return it."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    card = adapter_card(profile, record, config, describes, data, example)
    files.write_text(folder / "README.md", card)
    return card
