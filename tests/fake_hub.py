"""A hub on this machine's loopback: real files over real HTTP, as huggingface_hub asks for them, with faults on demand.

`HF_ENDPOINT` points a fresh process at it. Every repository `FAULT/tiny-falcon` holds the tiny Falcon's files at one commit; its owner's
name says what goes wrong, see `FakeHub.fault`. What was asked is kept in `requests`.
"""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"the tiny Falcon's only commit", usedforsecurity=False).hexdigest()
NAMES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
TOKEN = "one that may read"  # noqa: S105 - of nothing but this hub
STATUS = {"401": (401, "GatedRepo"), "403": (403, "GatedRepo"), "404": (404, "RepoNotFound"), "429": (429, ""), "500": (500, ""), "norevision": (404, "RevisionNotFound")}  # fmt: skip
SLOW = 20  # seconds before a slow answer, far beyond the timeouts that the tests set


def blob_id(content: bytes) -> str:
    """git's hash of a file, by which the hub names small ones."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class FakeHub:
    """Serves `folder`'s files while active; `url` is its endpoint."""

    def __init__(self, folder: Path):
        self.files = {name: (folder / name).read_bytes() for name in NAMES}
        self.requests: list[tuple[str, str, str]] = []  # (method, path, range)
        self.spent: set[str] = set()  # owners whose one fault was given
        hub = self

        class Handler(Answer):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def fault(self, owner: str, name: str) -> str | None:
        """What is wrong with an answer about file `name` (or "api"): a status, for the two that huggingface_hub tries again for long only on
        the weights. `broken`, `short` and `wrong` go wrong once, on the weights: the connection breaks in the middle; half of what was
        announced is all; a byte is another. `slow` never sends them in time.
        """
        if owner in STATUS and (owner not in ("429", "500") or name == "model.safetensors"):
            return owner
        if owner == "slow" and name == "model.safetensors":
            return owner
        if owner in ("broken", "short", "wrong") and name == "model.safetensors" and owner not in self.spent:
            return owner
        return None


class Answer(BaseHTTPRequestHandler):
    """One request: /api/models/REPO..., /REPO/resolve/REVISION/NAME, or /cdn/OWNER/NAME, where large files lie."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        parts = path.strip("/").split("/")
        try:
            if parts[:2] == ["api", "models"]:
                self.about(parts[2], parts[4:])
            elif parts[0] == "cdn":
                self.content(parts[1], parts[2])
            elif len(parts) > 4 and parts[2] == "resolve":
                self.resolve(parts[0], "/".join(parts[4:]))
            else:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the other side gave up

    def send(self, status: int, body: bytes, headers: dict[str, str], announced: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body) if announced is None else announced), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refused(self, owner: str, name: str) -> bool:
        """Whether the answer is an error, which is sent."""
        fault = self.hub.fault(owner, name)
        if fault not in STATUS or (fault == "401" and self.headers.get("Authorization") == f"Bearer {TOKEN}"):
            return False
        status, code = STATUS[fault]
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": "as asked for"} if code else {})
        return True

    def about(self, owner: str, rest: list[str]) -> None:
        """What a repository holds: its commit and names, or with `tree` each file's size and hashes."""
        if self.refused(owner, "api"):
            return
        if rest[:1] == ["tree"] and len(rest) > 2:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})  # no folders in this repository
            return
        entries = []
        for name, content in self.hub.files.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 132}
            entries.append(entry)
        repository = {"id": f"{owner}/tiny-falcon", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.hub.files]}
        body = json.dumps(entries if rest[:1] == ["tree"] else repository).encode()
        self.send(200, body, {"Content-Type": "application/json"})

    def resolve(self, owner: str, name: str) -> None:
        """A small file itself; for a large one its size and hash, and where it lies."""
        if self.refused(owner, name):
            return
        content = self.hub.files.get(name)
        if content is None:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{blob_id(content)}"', "Accept-Ranges": "bytes"}
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content)), "Location": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{owner}/{name}"}  # fmt: skip
            self.send(302, b"", headers)
        else:
            self.send(200, content, headers)

    def content(self, owner: str, name: str) -> None:
        """The bytes of a large file, from where `Range` says, with the owner's one fault."""
        content, fault = self.hub.files[name], self.hub.fault(owner, name)
        if fault == "slow":
            time.sleep(SLOW)
        if self.command == "GET" and fault in ("broken", "short", "wrong"):
            self.hub.spent.add(owner)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        body = content[start:]
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        if fault == "wrong":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "broken":
            self.send(200, body[: len(body) // 2], headers, announced=len(body))
            self.close_connection = True
        else:
            self.send(206 if start else 200, body, headers)
