"""The workflows say what they are meant to say, in valid YAML, and call nothing that is not there."""

import re

import pytest

from tests.notebooks import ROOT

yaml = pytest.importorskip("yaml", reason="PyYAML is no dependency of its own; it comes with transformers and accelerate")
WORKFLOWS = {path.name: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}
STEP = {"name", "uses", "run", "with", "if", "env", "id", "working-directory", "shell"}
JOB = {"runs-on", "steps", "timeout-minutes", "strategy", "env", "needs", "if", "name"}
EVENTS = {"push", "pull_request", "schedule", "workflow_dispatch"}


def load(name: str) -> dict:
    workflow = yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))
    workflow["on"] = workflow.pop(True, workflow.get("on"))  # YAML 1.1 reads `on` as true
    return workflow


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_structure(name):
    workflow = load(name)
    assert set(workflow) <= {"name", "on", "jobs", "env", "permissions", "concurrency"}
    assert set(workflow["on"]) <= EVENTS and workflow["on"]
    for job in workflow["jobs"].values():
        assert set(job) <= JOB and {"runs-on", "steps", "timeout-minutes"} <= set(job)
    for step in steps(workflow):
        assert set(step) <= STEP
        assert ("uses" in step) != ("run" in step)
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1"))
        assert isinstance(step.get("run", ""), str)


def test_every_python_is_quoted_and_supported():
    """3.10 unquoted would be the number 3.1."""
    versions = load("ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.13"]


def test_ci_runs_the_repositorys_own_script_caches_and_keeps_the_notebooks():
    workflow = load("ci.yml")
    assert any(step.get("run") == ".ci/run" for step in steps(workflow))
    (python,) = (step for step in steps(workflow) if step.get("uses", "").startswith("actions/setup-python@"))
    assert python["with"]["cache"] == "pip"
    for path in python["with"]["cache-dependency-path"].split():
        assert (ROOT / path).is_file(), path
    (upload,) = (step for step in steps(workflow) if step.get("uses", "").startswith("actions/upload-artifact@"))
    assert list(ROOT.glob(upload["with"]["path"]))
    assert "matrix.python" in upload["with"]["name"]  # two uploads of one name would fail


def test_a_weekly_run_takes_the_pins_off():
    workflow = load("newest.yml")
    (entry,) = workflow["on"]["schedule"]
    fields = entry["cron"].split()
    assert len(fields) == 5 and fields[2:4] == ["*", "*"] and fields[4].isdigit()  # one day a week
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    (pins_off,) = (command for command in commands if "sed" in command)
    pattern, replacement = re.match(r"sed 's/(.*)/(.*)/' requirements.txt > ", pins_off).groups()
    unpinned = [re.sub(pattern, replacement, line) for line in (ROOT / "requirements.txt").read_text().splitlines()]
    packages = [line for line in unpinned if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", line) for line in packages)
    assert "pip install --upgrade" in pins_off
    assert commands.index("make .venv/ready") < commands.index(pins_off) < commands.index("make test")


@pytest.mark.parametrize(
    "text", [*(p.read_text() for p in WORKFLOWS.values()), (ROOT / ".ci" / "run").read_text()], ids=[*WORKFLOWS, "run"]
)
def test_every_make_target_exists(text):
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z0-9-]*)", text)) <= targets
