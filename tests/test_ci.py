"""The workflows keep GitHub's schema, say what they are meant to say, may do nothing but read, and call nothing that is not there."""

import re

import pytest
import yaml

from tests.notebooks import ROOT
from tests.schemas import against_schema

WORKFLOWS = {path.name: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def load(name: str) -> dict:
    workflow = yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))
    workflow["on"] = workflow.pop(True, workflow.get("on"))  # YAML 1.1 reads `on` as true
    return workflow


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_workflows_and_dependabot_keep_githubs_schemas():
    for schema, paths in (("github-workflows", WORKFLOWS.values()), ("dependabot", [ROOT / ".github" / "dependabot.yml"])):
        done = against_schema(schema, *paths)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(("sound", "broken"), [("runs-on:", "runs_on:"), ("contents: read", "contents: reed")])
def test_the_schema_refuses_what_github_would(sound, broken, tmp_path):
    text = WORKFLOWS["ci.yml"].read_text()
    assert sound in text
    (tmp_path / "ci.yml").write_text(text.replace(sound, broken))
    done = against_schema("github-workflows", tmp_path / "ci.yml")
    assert done.exit_code == 1
    assert "Schema validation errors" in done.output


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_a_workflow_may_only_read_and_ends(name):
    """A job that publishes may write pages, and nothing else; no job leaves its token in the checkout, or runs for ever."""
    workflow = load(name)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert set(job.get("permissions", {}).items()) <= {("contents", "read"), ("pages", "write"), ("id-token", "write")}
        assert job["timeout-minutes"] <= 90
    for step in steps(workflow):
        assert "actions/checkout" not in step.get("uses", "") or step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_actions_are_pinned_to_commits(name):
    """A tag can be moved by whoever takes over the action's repository; a commit cannot."""
    for line in WORKFLOWS[name].read_text().splitlines():
        if "uses:" in line:
            pin = r" *(?:- )?uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+"
            assert re.fullmatch(pin, line), f"{line.strip()}: name the commit of a release, and the release in a comment"


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
    uploads = {
        step["with"]["path"]: step["with"]["name"]
        for step in steps(workflow)
        if "actions/upload-artifact@" in step.get("uses", "")
    }
    assert set(uploads) == {"notebooks/*.ipynb", "build/screenshots/*.png"}
    assert all("matrix.python" in name for name in uploads.values())  # two uploads of one name would fail


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
