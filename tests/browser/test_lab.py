"""JupyterLab as `make lab` starts it, in a browser: Run All Cells, watched to its end."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import time
import urllib.request
from types import SimpleNamespace

import pytest

from tests.notebooks import ROOT, code_cells, copy_checkout, notebook, read, source

# All others are executed by nbval, like these
FINE_TUNE, LAYER = (notebook(number).name for number in ("05", "03"))
OWN = "05_own.ipynb"  # the same on a reader's own CSV
FORM = {"DATA": "own.csv", "PROMPT_COLUMN": "question", "ANSWER_COLUMN": "reply", "STEPS": 40}
LIMIT = 600  # seconds for one notebook on a busy machine; an idle one takes two minutes at most
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # unseen cells stay in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},
}
# What the page shows while it runs; JupyterLab shows errors as it shows stderr
STATE = """() => {
    const all = selector => [...document.querySelectorAll('.jp-Notebook ' + selector)];
    const texts = selector => all(selector).map(node => node.textContent.trim());
    const stderr = texts('[data-mime-type="application/vnd.jupyter.stderr"]');
    const bars = stderr.concat(texts('.widget-html-content')).filter(t => /\\d+%\\|/.test(t));
    const kernel = document.querySelector('.jp-NotebookPanel .jp-Notebook-ExecutionIndicator');
    return {
        errors: stderr.filter(text => text.includes('Traceback')), stderr, bars,
        prompts: texts('.jp-CodeCell .jp-InputArea-prompt'), kernel: kernel?.dataset.status,
        figures: all('.jp-OutputArea img').filter(image => image.naturalWidth > 100).length,
    };
}"""


def copy_without_outputs(folder):
    """A copy of this checkout without stored outputs: what is seen was made."""
    copy_checkout(folder)
    for path in (folder / "notebooks").glob("*.ipynb"):
        book = read(path)
        for cell in book["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = [], None
        path.write_text(json.dumps(book), encoding="utf-8")
    own = read(folder / "notebooks" / FINE_TUNE)
    form = next(cell for cell in own["cells"] if "DATA = " in source(cell))
    form["source"] = source(form)
    for field, value in FORM.items():
        line = f"{field} = {value!r}"
        form["source"], found = re.subn(rf"(?m)^{field} = .*$", line, form["source"])
        assert found == 1, field
    (folder / "notebooks" / OWN).write_text(json.dumps(own), encoding="utf-8")
    rows = [f"What does item {n} cost?,It costs {3 * n} euros." for n in range(60)]
    (folder / "own.csv").write_text("\n".join(["question,reply", *rows]), encoding="utf-8")
    (folder / ".venv").symlink_to(ROOT / ".venv")


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """Address and token of a JupyterLab, started by `make lab` in a copy of the checkout."""
    if not (ROOT / ".venv" / "bin" / "jupyter").exists():
        pytest.skip("JupyterLab is not installed: make .venv/ready")
    copy, home = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("jupyter")
    token, settings_folder = secrets.token_hex(16), home / "config" / "lab" / "user-settings"
    copy_without_outputs(copy)
    for name, settings in SETTINGS.items():
        path = settings_folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    options = {"ServerApp": {"allow_root": True, "open_browser": False}}
    (home / "config" / "jupyter_server_config.json").write_text(json.dumps(options))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kinds = ("config", "data", "runtime")
    environment = os.environ | {f"JUPYTER_{kind.upper()}_DIR": str(home / kind) for kind in kinds}
    environment |= {"JUPYTER_PORT": str(port), "JUPYTER_TOKEN": token, "QLORA_PROFILE": "tiny"}
    environment["PYTHONPATH"] = str(ROOT / "tests" / "guard")
    log = (home / "log").open("w")
    command = ["make", "--assume-old=.venv/ready", "lab"]  # its .venv is the checkout's
    options = {"cwd": copy, "env": environment, "stdout": log, "stderr": log}
    server = subprocess.Popen(command, **options, start_new_session=True)
    try:
        for _ in range(120):
            try:
                address = f"http://127.0.0.1:{port}/api?token={token}"
                urllib.request.urlopen(address, timeout=5)  # noqa: S310 - loopback
                break
            except OSError:
                assert server.poll() is None, (home / "log").read_text()
                time.sleep(0.5)
        yield SimpleNamespace(address=f"http://127.0.0.1:{port}", token=token)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)  # make, the server, and with it the kernels
            server.wait(30)


def run_all(page, shots) -> list[dict]:
    """Click Run, then Run All Cells; the page's states until every cell has run or one failed."""
    for _ in range(12):  # until the kernel has told its name, the click is taken and forgotten
        page.wait_for_timeout(2000)
        if any(prompt != "[ ]:" for prompt in page.evaluate(STATE)["prompts"]):
            break
        page.locator(".lm-MenuBar-itemLabel:text-is('Run')").click()
        page.locator(".lm-Menu-itemLabel:text-is('Run All Cells')").click()
    states, end = [], time.monotonic() + LIMIT
    while time.monotonic() < end:
        states.append(page.evaluate(STATE))
        now = states[-1]
        done = all(prompt.strip("[]: *").isdigit() for prompt in now["prompts"])
        if now["errors"] or (done and now["kernel"] == "idle"):
            return states
        page.wait_for_timeout(500)
    page.screenshot(path=shots / "lab-failed.png")
    pytest.fail(f"still running after {LIMIT} s: {states[-1]['prompts']}")


@pytest.mark.parametrize("name", [FINE_TUNE, OWN, LAYER])
def test_run_all_cells(lab, browser, shots, name):
    cells = code_cells(notebook(name[:2]))
    outputs = [output for cell in cells for output in cell["outputs"]]
    figures = sum("image/png" in output.get("data", {}) for output in outputs)
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    # a workspace of its own: JupyterLab would open the notebook before it again, too
    stem = name.removesuffix(".ipynb")
    page.goto(f"{lab.address}/lab/workspaces/{stem}/tree/notebooks/{name}?token={lab.token}")
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=60_000)
    assert page.evaluate(STATE)["figures"] == 0
    states = run_all(page, shots)
    last = states[-1]
    page.screenshot(path=shots / f"lab-{stem}.png")
    for kernel in page.request.get(f"{lab.address}/api/kernels?token={lab.token}").json():
        page.request.delete(f"{lab.address}/api/kernels/{kernel['id']}?token={lab.token}")
    page.close()
    assert not last["errors"], last["errors"][0]
    hidden = [cell["metadata"].get("jupyter", {}).get("source_hidden") for cell in cells]
    # in order, and a folded cell shows no number
    seen = [at for at, folded in enumerate(hidden, 1) if not folded]
    assert [int(prompt.strip("[]: ")) for prompt in last["prompts"]] == seen
    assert last["kernel"] == "idle" and last["figures"] == figures
    assert not [text for text in last["stderr"] if "Warning" in text]
    assert any(state["kernel"] == "busy" for state in states)
    if name == FINE_TUNE:
        seen = {text for state in states for text in state["bars"]}
        assert len(seen) >= 3, f"training showed no bar that moves: {seen}"
