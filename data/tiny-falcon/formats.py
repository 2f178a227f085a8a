"""Notebook 02's contest of formats on other models: what each format costs in perplexity.

`python data/tiny-falcon/formats.py FOLDER ...`, a minute for each model that `make pretrain` wrote
(ARGS="--seed 1 --output FOLDER"), writes formats.csv. The code that runs is the notebook's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "02_nf4_quantization.ipynb"
BEFORE = """from dataclasses import replace
from helpers import environment, plotting, profiles
profiles.PROFILES["tiny"] = replace(profiles.PROFILES["tiny"], model={folder!r})"""
AFTER = """import json
print(json.dumps({name: rise[name] for name in rivals}))"""


def contest(folder: Path) -> list[dict]:
    """Rows of formats.csv for the model in `folder`: the mean rise in percent over six orders."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    _, *code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    last = next(i for i, cell in enumerate(code) if "ORDERS = " in cell)
    program = [BEFORE.format(folder=str(folder.resolve())), *code[: last + 1], AFTER]
    # -O leaves out the assertions: they speak of the notebook's own model
    command = [sys.executable, "-O", "-c", "\n\n".join(program)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"MPLBACKEND": "Agg"},
        stdout=subprocess.PIPE,
        check=True,
    )
    made = json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))
    model = {"steps": made["steps"], "seed": made["seed"]}
    rise = json.loads(done.stdout.splitlines()[-1])
    return [model | {"format": f} | pd.DataFrame(rise[f]).mean().round(4).to_dict() for f in rise]


if __name__ == "__main__":
    rows = [row for folder in sys.argv[1:] for row in contest(Path(folder))]
    pd.DataFrame(rows).to_csv(Path(__file__).with_name("formats.csv"), index=False)
