"""data/soak.json: what the soak measured, in figures and in the words of tests/README.md; and a soak that goes on where it was stopped."""

import hashlib
import json
from collections.abc import Callable, Iterable

from tqdm import tqdm

from helpers import files, results
from helpers.profiles import ROOT
from tests.notebooks import NOTEBOOKS

SOAK = ROOT / "data" / "soak.json"


def code() -> str:
    """A hash over what the soak depends on: helpers, tests and notebooks."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "helpers").rglob("*.py"), *(ROOT / "tests").glob("*.py"), *NOTEBOOKS]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def step_by_step(name: str, options: dict, jobs: Iterable, do: Callable) -> list:
    """[do(job) for job in jobs] with a bar; what is done is kept in runs/soak, so that a stopped soak goes on from there."""
    kept, wanted, jobs = ROOT / "runs" / "soak" / f"{name}.json", [options, code()], list(jobs)
    kept.parent.mkdir(parents=True, exist_ok=True)
    done = []
    if kept.exists():
        found = json.loads(kept.read_text())
        done = found["done"] if found["wanted"] == wanted else []
    for job in tqdm(jobs[len(done) :], desc=name, initial=len(done), total=len(jobs)):
        done.append(do(job))
        files.write_text(kept, json.dumps({"wanted": wanted, "done": done}))
    kept.unlink(missing_ok=True)
    return done


def store(name: str, section: dict) -> None:
    """Put a section into data/soak.json, with the versions it was measured with."""
    whole = json.loads(SOAK.read_text()) if SOAK.exists() else {}
    whole[name] = section | {"versions": results.versions()}
    files.write_text(SOAK, json.dumps(dict(sorted(whole.items())), indent=1) + "\n")


def quotes(soak: dict) -> list[str]:
    """What data/soak.json says, in the words of tests/README.md."""
    said = []
    if "kills" in soak:
        killed, interrupted = soak["kills"]["sigkill"], soak["kills"]["sigint"]
        ended = [f"{found['ended_as_undisturbed']} of {found['runs']}" for found in (killed, interrupted)]
        said.append(f"{ended[0]} runs struck by SIGKILL and {ended[1]} by SIGINT ended with the adapter of the undisturbed run")
        said.append(f"{killed['resumed']} and {interrupted['resumed']} of them resumed, the others started again")
        said.append(
            f"{killed['found_half_written']} of the killed runs left something half-written, and no restart took it for whole"
        )
    if "notebooks" in soak:
        every = soak["notebooks"]["notebooks"].values()
        count = {
            key: sum(v if isinstance(v, int) else len(v) for v in (found[key] for found in every)) for key in next(iter(every))
        }
        said.append(
            f"{count['executions']} executions of {len(every)} notebooks: {count['of_them_differing']} of {count['cells_compared']} compared cells ever differed"
        )
        said.append(f"{count['others_differing']} of the {count['others']} other cells")
    if "repeats" in soak:
        found = soak["repeats"]
        said.append(f"{found['passed']} of {found['repeats']} repetitions passed, of {found['tests']} tests each")
    return said
