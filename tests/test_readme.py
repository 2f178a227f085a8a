"""README shows what was measured and predicted, not what somebody typed once."""

import json
import re
from functools import partial

import pytest

from data.measured.measure import IN_TURNS, MEASURED
from helpers import memory, profiles
from tests.notebooks import NOTEBOOKS, ROOT, notebook, printed, python
from tests.publish import linked

README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = " ".join(README.split())
WORKFLOWS = ROOT / ".github" / "workflows"
MAP = [line for line in README.splitlines() if line.startswith("| [")]
GPUS = json.loads(MEASURED.read_text()).values()


def measured(profile) -> str:
    """On a GPU the stored bytes, which are counted, and the most that a step added to it."""
    if not profile.gpu_bytes:
        return "runs in CI"
    runs = [card[profile.name]["full"] for card in GPUS if profile.name in card]
    stored = memory.stored(memory.known_config(profile.model), profile, "qlora")
    held = sum(stored[name] for name in ("weights", "constants", "rest", "adapter", "optimizer"))
    peak = held + max(run["max_memory_allocated"] - run["memory_allocated"] for run in runs)
    return f"{peak / 1e9:.1f} GB"


@pytest.mark.parametrize("profile", profiles.PROFILES.values(), ids=profiles.PROFILES)
def test_hardware_table_is_computed(profile):
    card, need = "any CPU", "none"
    if profile.gpu_bytes:
        name = profile.name.split("-")[1].upper()
        gpu = next(gpu for gpu in memory.GPUS if gpu.startswith(name))
        card = f"{name}, {memory.GPUS[gpu] / 1e9:.1f} GB"
        assert profile.gpu_bytes == {"T4": 15, "L4": 23, "A100": 40}[name] * 10**9  # its name says
        plan = memory.plan(memory.known_config(profile.model), profile)
        need = f"{plan.total / 1e9:.1f} GB"
    batch = f"{profile.micro_batch} (× {profile.accumulation}) × {profile.max_length}"
    cells = [card, f"`{profile.name}`", profile.model, profile.compute_dtype, batch, need]
    assert f"| {' | '.join([*cells, measured(profile)])} |" in README


def test_other_figures_are_computed():
    tiny, falcon = map(memory.known_config, (profiles.PROFILES["tiny"].model, profiles.FALCON_7B))
    assert f"{sum(memory.count_parameters(tiny).values()) / 1e6:.2f} million parameters" in README
    assert f"`Linear4bit` layers: Falcon-7b has {len(memory.skeleton(falcon).layers)}." in README
    assert f"with {memory.CUDA_CONTEXT / 1e9:.1f} GB for CUDA" in README


def test_every_notebook_is_on_the_map_with_its_badge():
    assert len(MAP) == len(NOTEBOOKS)
    for path, row in zip(NOTEBOOKS, MAP, strict=True):
        address = f"github/{linked(README)[0]}/blob/main/notebooks/{path.name})"
        assert f"(notebooks/{path.name})" in row and address in row
    for workflow in re.findall(r"workflows/(\w+\.yml)", README):
        assert (WORKFLOWS / workflow).exists()


def test_the_lines_without_make_start_what_they_say_and_a_workflow_runs_them(tmp_path):
    """Here with this Python and without installing; on three systems in the workflow."""
    block = re.search(r"### Without make\n\n```bash\n(.*?)```", README, re.DOTALL).group(1)
    venv, activate, install, train, lab = (line.split("  ")[0] for line in block.splitlines())
    steps = re.findall(r"run: (.*)", (WORKFLOWS / "platforms.yml").read_text())
    assert {install, train} <= set(steps)
    run = partial(python, check=True)
    run(*venv.split()[1:], "--without-pip", cwd=tmp_path)
    assert (tmp_path / activate.removeprefix("source ")).exists()
    torch = re.search(r"torch==\S+", (ROOT / "requirements.txt").read_text()).group()
    assert install.endswith("-r requirements.txt") and f"pip install {torch} --index" in README
    assert "--prompt-column" in run("-m", train.split()[-1], "--help").stdout
    _, *command, folder = lab.split()
    assert run(*command, "--version").stdout[0].isdigit() and (ROOT / folder).is_dir()


def test_the_answer_on_speed_is_what_was_measured():
    sixteen = "16-bit LoRA, colab-a100"
    pairs = [(card["colab-a100"], card[sixteen]) for card in GPUS if sixteen in card]
    steps = [a["full"]["seconds_per_step"] / b["full"]["seconds_per_step"] for a, b in pairs]
    answers = [r["times_as_long"][1] for card in GPUS for r in card.get(IN_TURNS, {}).values()]
    assert f"{min(steps):.2f} to {max(steps):.2f} times as long as 16-bit LoRA's" in TEXT
    assert f"{min(answers):.1f} to {max(answers):.1f} times" in TEXT


def test_the_answer_on_how_much_data_is_what_notebook_07_printed():
    row = re.compile(r"^(50|100|200|500|2000) +(\d+\.\d) +(\d+\.\d) +(\d+\.\d) ", re.MULTILINE)
    found = {int(n): list(map(float, s)) for n, *s in row.findall(printed(notebook("07")))}
    assert "100 examples gave 99% of known phrases" in TEXT and "8 to 10 points may have" in TEXT
    assert all(98.5 <= share < 99.7 for share in found[100])
    gains = re.split("2,000 minus 200", printed(notebook("07")))[1]
    gains = re.findall(r"(?:full|LoRA) .*([+-]\d+\.\d)±(\d+\.\d)", gains)[:3]
    assert [round(float(a) + float(b)) for a, b in gains] == [10, 8, 8]


def test_the_answers_on_four_bits_and_rates_are_what_notebook_07_printed():
    first, *parts = re.split("best +LoRA|minus LoRA at equal rates", printed(notebook("07")))
    best, equal = (re.search(r"\nall.*", part)[0].split() for part in parts)
    text = TEXT.replace(" ± ", "±")
    (other,) = re.findall(r"(?m)^base 4, full 32 0.0001 +(\S+)$", printed(notebook("07")))
    assert f"3e-4, is {equal[1]} points" in text
    assert f"there, is {best[2]}: undecided (of nine other rates" in text
    assert f"about as good one makes it {other}, behind" in text
    table = first.split("base 4\n")[1].split("better")[0]  # gains are its last column
    gains = [float(gain) for gain in re.findall(r"([+-][\d.]+)±[\d.]+\n", table)]
    assert f"five setups gained {min(gains):.0f} to {max(gains):.0f} points" in text
    assert re.search(r"better +10 of 19 .*\nworse +0 ", first) and "10 of 19 cases, worse" in text
