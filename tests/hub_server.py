"""A small Hub on this machine: enough of its protocol for real `huggingface_hub` calls to create, push and load."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


USER, WRITE, READ = "ada", "hf_writeAndReadToken", "hf_readOnlyToken"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class Repo:
    """Files by path; each commit that changes something has a number."""

    def __init__(self, private: bool = False) -> None:
        self.private, self.files, self.commits = private, {}, 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Attributes: repos by id; `trouble`, what the next commits meet: a status, or "drop" for a closed connection."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.trouble: list[int | str] = []
        self.unreachable = False
        self.url = f"http://127.0.0.1:{self.server_port}"

    def add(self, repo_id: str, folder: Path) -> None:
        """A public repository with the files of a folder, as if somebody had pushed them."""
        repo = self.repos[repo_id] = Repo()
        repo.commits = 1
        repo.files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def blob_id(content: bytes) -> str:
    """As git names it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_POST(self) -> None:
        self.answer("POST")

    def answer(self, method: str) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.unreachable:
            return self.drop()
        path = unquote(urlsplit(self.path).path)
        for verb, pattern, name in ROUTES:
            if (match := re.fullmatch(pattern, path)) and method in verb:
                return self.route(name, **match.groupdict())
        return self.error(404, "EntryNotFound")

    def route(self, name: str, repo: str | None = None, **parts: str) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", WRITE, READ):
            return self.error(401, message="Invalid credentials in Authorization header")
        if name in ("create", "commit", "preupload", "may_write") and token != WRITE:
            return self.error(403 if token else 401, message="You may not write here")
        if repo is not None:
            self.repo, self.repo_id = self.server.repos.get(repo), repo
            if self.repo is None or (self.repo.private and not token):
                return self.error(404, "RepoNotFound")
        return getattr(self, name)(**parts)

    def create(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if not repo_id.startswith(f"{USER}/"):
            return self.error(403, message=f"You may not create {repo_id}")
        exists = repo_id in self.server.repos
        if not exists:
            self.server.repos[repo_id] = Repo(wanted.get("private") or wanted.get("visibility") == "private")
        return self.reply({"url": f"{self.server.url}/{repo_id}", "id": repo_id}, 409 if exists else 200)

    def validate(self) -> None:
        self.reply({"errors": [], "warnings": []})

    def may_write(self) -> None:
        self.reply({})

    def preupload(self) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "regular",
                "shouldIgnore": False,
                "oid": blob_id(self.repo.files[file["path"]]) if file["path"] in self.repo.files else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.reply({"files": files})

    def commit(self) -> None:
        trouble = self.server.trouble.pop(0) if self.server.trouble else None
        if trouble == "drop":
            return self.drop()
        if trouble is not None:
            return self.error(trouble)
        lines = [json.loads(line) for line in self.body.splitlines()]
        added = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
        self.repo.files |= {path: base64.b64decode(content) for path, content in added.items()}
        self.repo.commits += 1
        url = f"{self.server.url}/{self.repo_id}/commit/{self.repo.sha}"
        return self.reply({"commitUrl": url, "commitOid": self.repo.sha, "success": True})

    def info(self) -> None:
        siblings = [{"rfilename": path} for path in self.repo.files]
        about = {"id": self.repo_id, "sha": self.repo.sha, "private": self.repo.private, "siblings": siblings}
        self.reply(about | {"modelId": self.repo_id, "tags": [], "downloads": 0, "likes": 0})

    def tree(self) -> None:
        files = self.repo.files.items()
        self.reply([{"type": "file", "path": p, "size": len(c), "oid": blob_id(c)} for p, c in files])

    def resolve(self, path: str) -> None:
        content = self.repo.files.get(path)
        if content is None:
            return self.error(404, "EntryNotFound")
        return self.send(200, content, {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": self.repo.sha})

    def reply(self, content: object, status: int = 200) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        self.send(status, json.dumps({"error": message}).encode(), headers | {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def drop(self) -> None:
        self.close_connection = True


ROUTES = (
    (("POST",), "/api/repos/create", "create"),
    (("POST",), "/api/validate-yaml", "validate"),
    (("GET",), f"/api/models/{REPO}/auth-check/write", "may_write"),
    (("POST",), f"/api/models/{REPO}/preupload/[^/]+", "preupload"),
    (("POST",), f"/api/models/{REPO}/commit/[^/]+", "commit"),
    (("GET",), f"/api/models/{REPO}/tree/[^/]+", "tree"),
    (("GET",), f"/api/models/{REPO}(/revision/[^/]+)?", "info"),
    (("GET", "HEAD"), f"/{REPO}/resolve/[^/]+/(?P<path>.+)", "resolve"),
)
