"""`make lab`, started for real: on this machine only, with its token on, and a notebook that is opened is not thereby run."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.notebooks import NOTEBOOKS, ROOT

pytest.importorskip("jupyterlab", reason="JupyterLab is no part of Colab's packages")


def recipe() -> list[str]:
    """The command of `make lab`, with this Python's Jupyter in the place of .venv's."""
    line = re.search(r"^lab:.*\n\t(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    assert line.startswith("$(BIN)/jupyter ")
    return [sys.executable, "-m", *shlex.split(line.removeprefix("$(BIN)/"))]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(process, address, token, folder) of `make lab` in an empty folder with one notebook, with nobody's settings."""
    folder, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("home")
    notebook = json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"source": f"open({str(folder / 'executed')!r}, 'w')", "metadata": {"trusted": True, "init_cell": True}}
    (folder / "evil.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {f"JUPYTER_{name}_DIR": str(home / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    command = [*recipe(), "--no-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--allow-root"]
    log = (home / "log").open("w")
    process = subprocess.Popen(command, cwd=folder, env=os.environ | places | {"HOME": str(home)}, stdout=log, stderr=log)
    try:
        known = home / "RUNTIME" / f"jpserver-{process.pid}.json"
        deadline = time.monotonic() + 60
        while not known.exists() or not psutil.Process(process.pid).net_connections("inet"):
            assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.1)
        yield process, f"http://127.0.0.1:{port}", json.loads(known.read_text())["token"], folder
    finally:
        process.terminate()
        process.wait(20)


def get(address: str, token: str | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(address, headers={"Authorization": f"token {token}"} if token else {})  # noqa: S310 - loopback
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - loopback
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_it_listens_on_this_machine_only(server):
    process, address, _, _ = server
    listening = [one.laddr for one in psutil.Process(process.pid).net_connections("inet") if one.status == psutil.CONN_LISTEN]
    assert f"127.0.0.1:{address.rpartition(':')[2]}" in {f"{at.ip}:{at.port}" for at in listening}
    assert {at.ip for at in listening} == {"127.0.0.1"}


@pytest.mark.parametrize("page", ["/api/contents", "/api/contents/evil.ipynb", "/api/kernels", "/api/sessions", "/api/terminals"])
def test_nothing_is_answered_without_the_token(server, page):
    _, address, token, _ = server
    assert len(token) >= 32
    assert get(address + page)[0] == 403
    assert get(address + page, "0" * len(token))[0] == 403
    assert get(address + page, token)[0] == 200


def test_a_malicious_notebook_is_shown_and_neither_trusted_nor_run(server):
    _, address, token, folder = server
    status, answer = get(f"{address}/api/contents/evil.ipynb", token)
    cells = [cell for cell in json.loads(answer)["content"]["cells"] if cell["cell_type"] == "code"]
    assert status == 200 and cells
    assert not any(cell["metadata"]["trusted"] for cell in cells), "what its metadata says of trust is believed"
    assert get(f"{address}/lab/tree/evil.ipynb", token)[0] == 200
    assert json.loads(get(f"{address}/api/kernels", token)[1]) == []
    assert not Path(folder / "executed").exists()


def test_the_recipe_gives_no_token_or_password_away():
    assert not [word for word in recipe() if re.search("token|password|allow_origin|disable_check_xsrf", word, re.IGNORECASE)]
