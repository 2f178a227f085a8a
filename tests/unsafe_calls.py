"""Finds, in Python source, what runs or trusts code that came with data: pickles, remote code, moving hub revisions."""

import ast
import re
from collections.abc import Iterator

PICKLES = re.compile(
    r"(?:(?:pickle|_pickle|dill|cloudpickle|marshal|joblib|shelve)\.(?:loads?|Unpickler|open)|pandas\.read_pickle)"
)
SAFE_YAML = {"yaml.SafeLoader", "yaml.CSafeLoader"}
FROM_HUB = {"from_pretrained", "snapshot_download", "hf_hub_download", "load_dataset", "load_dataset_builder"}


def full_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: {"np": "numpy", "load": "torch.load"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name): alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {(alias.asname or alias.name): f"{node.module}.{alias.name}" for alias in node.names}
    return names


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    """A dotted expression with its first part resolved: `np.load` is "numpy.load"."""
    first, dot, rest = ast.unparse(node).partition(".")
    return names.get(first, first) + dot + rest


def is_true(node: ast.expr | None) -> bool:
    """Whether an argument is the constant True, or anything that is not a constant and so might be."""
    return node is not None and getattr(node, "value", True) is not False


def fault(call: ast.Call, names: dict[str, str]) -> str:
    """What is wrong with a call, or ""."""
    name, keywords = full_name(call.func, names), {keyword.arg: keyword.value for keyword in call.keywords}
    if PICKLES.fullmatch(name):
        return f"{name} runs code"
    if name == "torch.load" and getattr(keywords.get("weights_only"), "value", None) is not True:
        return "torch.load without weights_only=True"
    if name.startswith("numpy.") and is_true(keywords.get("allow_pickle")):
        return f"{name} with allow_pickle"
    loader = keywords.get("Loader") or (call.args[1] if len(call.args) > 1 else None)
    if name in ("yaml.load", "yaml.load_all") and (loader is None or full_name(loader, names) not in SAFE_YAML):
        return f"{name} without SafeLoader"
    if is_true(keywords.get("trust_remote_code")):
        return "trust_remote_code is not False"
    model, revision = (str(getattr(node, "value", "")) for node in ((*call.args, None)[0], keywords.get("revision")))
    from_hub = name.rpartition(".")[2] in FROM_HUB and re.fullmatch(r"[\w-]+/[\w.-]+", model)
    if from_hub and not re.fullmatch("[0-9a-f]{40}", revision):
        return f"{model!r} at no fixed commit"
    return ""


def faults(source: str) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of every unsafe call in a module's or a cell's source, options given as a dictionary included."""
    tree = ast.parse(source)
    names = full_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (what := fault(node, names)):
            yield node.lineno, what
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if getattr(key, "value", None) in ("trust_remote_code", "allow_pickle") and is_true(value):
                    yield node.lineno, f"{key.value} is not False"
