"""A loopback server that speaks enough of the Hugging Face hub's API for its real clients.

    with serve_hub({"models": {"org/name": folder}, "datasets": {"org/name": folder}}) as url:
        subprocess.run([...], env=os.environ | hub_env(url, tmp_path))

`huggingface_hub` reads HF_ENDPOINT when it is imported, so a client belongs in a subprocess (`hub_env`), or
gets `endpoint=url` where its function takes one (`hf_hub_download`, `snapshot_download`, `HfApi`). Served:
repository info, refs, tree, paths-info, and files by HEAD and GET with ranges. Everything else, and every
unknown repository, revision or file, answers 404 with the error code the client looks for.

With `uploads` it takes commits as well, from whoever bears its token: repositories are made on request, large files
come by LFS, small ones inside the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

KINDS = ("models", "datasets")
CREATED = "2024-01-01T00:00:00.000Z"


class Repo(NamedTuple):
    """One served folder."""

    name: str
    folder: Path
    commit: str

    def files(self) -> list[str]:
        """Paths below the folder, with `/`."""
        return sorted(file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file())


class Uploads:
    """Where commits go: a folder of repositories, and what is needed to write to it."""

    def __init__(self, folder: Path, token: str) -> None:
        self.folder, self.token = folder, token
        self.large: dict[str, bytes] = {}
        """Files sent by LFS, by SHA-256, that no commit has named yet."""
        self.failing: set[str] = set()
        """Steps that are refused: preupload, lfs, commit."""


class NotFound(Exception):
    """What the client asked for is not there; `code` is the hub's X-Error-Code."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@contextmanager
def serve_hub(
    repos: Mapping[str, Mapping[str, str | Path]], requests: list[str] | None = None, uploads: Uploads | None = None
) -> Iterator[str]:
    """Serve folders as repositories on a free port of 127.0.0.1; yields the endpoint's URL.

    `repos` maps `models` and `datasets` to folders by repository name. `requests`, if given, collects a line
    `METHOD path` for each request. Folders are read at each request, so files may be added while serving. `uploads`
    takes commits to model repositories.
    """
    unknown = set(repos) - set(KINDS)
    if unknown:
        raise ValueError(f"unknown kind of repository {sorted(unknown)}; known: {KINDS}")
    served = {
        kind: {name: Repo(name, Path(folder), _commit(kind, name)) for name, folder in repos.get(kind, {}).items()}
        for kind in KINDS
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, served, requests, uploads))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hub_env(url: str, home: Path) -> dict[str, str]:
    """Environment variables for a client process: this hub, caches under `home`, and nothing of the real
    one."""
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def _commit(kind: str, name: str) -> str:
    return hashlib.sha1(f"{kind}/{name}".encode()).hexdigest()


def _info(repo: Repo) -> dict[str, Any]:
    return {
        "_id": repo.commit[:24],
        "id": repo.name,
        "modelId": repo.name,
        "author": repo.name.split("/")[0],
        "sha": repo.commit,
        "createdAt": CREATED,
        "lastModified": CREATED,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [{"rfilename": name} for name in repo.files()],
    }


def _refs(repo: Repo) -> dict[str, Any]:
    main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.commit}
    return {"branches": [main], "tags": [], "converts": []}


def _file_entry(repo: Repo, name: str) -> dict[str, Any]:
    data = (repo.folder / name).read_bytes()
    return {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}


def _folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _tree(repo: Repo, under: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders below `under`, as the tree endpoint lists them."""
    prefix = f"{under}/" if under else ""
    below = [name for name in repo.files() if name.startswith(prefix)]
    if not below:
        raise NotFound("EntryNotFound")
    folders = {
        prefix + "/".join(parts[:depth])
        for parts in (name[len(prefix) :].split("/") for name in below)
        for depth in range(1, len(parts))
    }
    entries = [_folder_entry(path) for path in sorted(folders)] + [_file_entry(repo, name) for name in below]
    return entries if recursive else [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]


def _paths_info(repo: Repo, paths: list[str]) -> list[dict[str, Any]]:
    """What each path is; paths that do not exist are left out, as the hub does."""
    names, entries = repo.files(), []
    for path in (path.strip("/") for path in paths):
        if path in names:
            entries.append(_file_entry(repo, path))
        elif any(name.startswith(f"{path}/") for name in names):
            entries.append(_folder_entry(path))
    return entries


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(
        self, repos: dict[str, dict[str, Repo]], requests: list[str] | None, uploads: Uploads | None, *args: Any
    ) -> None:
        self.repos, self.requests, self.uploads = repos, requests, uploads
        super().__init__(*args)  # handles the request: the fields must be there before

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: tests that want the requests pass a list."""

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def do_PUT(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _answer(self, body: bytes) -> None:
        url = urlsplit(self.path)
        if self.requests is not None:
            self.requests.append(f"{self.command} {self.path}")
        try:
            if self.uploads is not None and self._upload(self.uploads, url.path, body):
                return
            if url.path.startswith("/api/"):
                self._api(url.path.removeprefix("/api/"), parse_qs(url.query), body)
            else:
                self._file(url.path)
        except NotFound as error:
            self._send(
                json.dumps({"error": error.code}).encode(),
                HTTPStatus.NOT_FOUND,
                {"X-Error-Code": error.code, "Content-Type": "application/json"},
            )

    # --- commits ---

    def _upload(self, uploads: Uploads, path: str, body: bytes) -> bool:
        """Answer one of the requests that a commit is made of; False for any other."""
        if self.command == "PUT" and path.startswith("/lfs/"):  # a signed address: it carries no token
            uploads.large[path.rpartition("/")[2]] = body
            self._send(b"", HTTPStatus.OK, {})
            return True
        if self.command != "POST":
            return False
        if path == "/api/validate-yaml":  # the card's head
            self._send_json({"errors": [], "warnings": []})
            return True
        step = (
            "create"
            if path == "/api/repos/create"
            else "lfs"
            if path.endswith(".git/info/lfs/objects/batch")
            else next((name for name in ("preupload", "commit") if f"/{name}/" in path), None)
        )
        if step is None:
            return False
        if self.headers.get("Authorization") != f"Bearer {uploads.token}":
            self._send_json({"error": "Invalid credentials"}, HTTPStatus.UNAUTHORIZED)
        elif step in uploads.failing:
            self._send_json({"error": "out of order"}, HTTPStatus.BAD_REQUEST)
        elif step == "create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            (uploads.folder / name).mkdir(parents=True, exist_ok=True)
            self.repos["models"].setdefault(name, Repo(name, uploads.folder / name, _commit("models", name)))
            self._send_json({"url": f"{self._own_address()}/{name}", "name": name, "id": name})
        elif step == "preupload":
            self._send_json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "shouldIgnore": False,
                            "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".pt")) else "regular",
                        }
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        elif step == "lfs":
            self._send_json(
                {
                    "transfer": "basic",
                    "objects": [
                        {**wanted, "actions": {"upload": {"href": f"{self._own_address()}/lfs/{wanted['oid']}"}}}
                        for wanted in json.loads(body)["objects"]
                    ],
                },
                content_type="application/vnd.git-lfs+json",
            )
        else:
            self._commit(uploads, unquote(path.removeprefix("/api/models/")).partition("/commit/")[0], body)
        return True

    def _commit(self, uploads: Uploads, name: str, body: bytes) -> None:
        """Write every file that a commit names, once all are there."""
        found: dict[str, bytes] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                found[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = uploads.large[value["oid"]]
                if hashlib.sha256(data).hexdigest() != value["oid"] or len(data) != value["size"]:
                    raise ValueError(f"{value['path']} arrived damaged")
                found[value["path"]] = data
        for path, data in found.items():
            place = uploads.folder / name / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        self._send_json(
            {
                "success": True,
                "commitUrl": f"{self._own_address()}/{name}/commit/{_commit('models', name)}",
                "commitOid": _commit("models", name),
                "hookOutput": "",
            }
        )

    def _own_address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    # --- reading ---

    def _api(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        kind, _, rest = path.partition("/")
        repo, rest = self._repo(kind, unquote(rest))
        action, _, argument = rest.partition("/")
        revision, _, inner = argument.partition("/")
        if revision:
            self._check_revision(repo, revision)
        if self.command == "POST" and action == "paths-info":
            self._send_json(_paths_info(repo, self._paths(body)))
        elif self.command != "POST" and action in ("", "revision"):
            self._send_json(_info(repo))
        elif self.command != "POST" and action == "refs":
            self._send_json(_refs(repo))
        elif self.command != "POST" and action == "tree":
            self._send_json(_tree(repo, inner, query.get("recursive", [""])[0].lower() in ("true", "1")))
        else:
            raise NotFound("EntryNotFound")

    def _file(self, path: str) -> None:
        """`/{repo}/resolve/{revision}/{path}`, below `/datasets` for data sets."""
        kind, rest = ("datasets", path[10:]) if path.startswith("/datasets/") else ("models", path[1:])
        repo, rest = self._repo(kind, unquote(rest))
        match = re.fullmatch(r"resolve/([^/]+)/(.+)", rest)
        if not match:
            raise NotFound("EntryNotFound")
        self._check_revision(repo, match[1])
        if match[2] not in repo.files():
            raise NotFound("EntryNotFound")
        data = (repo.folder / match[2]).read_bytes()
        headers = {
            "ETag": f'"{_etag(data)}"',
            "X-Repo-Commit": repo.commit,
            "X-Linked-Size": str(len(data)),
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted or not data:
            self._send(data, HTTPStatus.OK, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        if first > last:
            self._send(b"", HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, {"Content-Range": f"bytes */{len(data)}"})
            return
        self._send(
            data[first : last + 1],
            HTTPStatus.PARTIAL_CONTENT,
            headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"},
        )

    def _repo(self, kind: str, rest: str) -> tuple[Repo, str]:
        """The repository that `rest` starts with (names have one part or two) and what follows it."""
        for name, repo in self.repos.get(kind, {}).items():
            if rest == name or rest.startswith(f"{name}/"):
                return repo, rest[len(name) + 1 :]
        raise NotFound("RepoNotFound")

    def _check_revision(self, repo: Repo, revision: str) -> None:
        if revision not in ("main", repo.commit):
            raise NotFound("RevisionNotFound")

    def _paths(self, body: bytes) -> list[str]:
        """The `paths` of a paths-info request: a form from huggingface_hub, JSON from others."""
        if "json" in (self.headers.get("Content-Type") or ""):
            paths = json.loads(body)["paths"]
            return [paths] if isinstance(paths, str) else paths
        return parse_qs(body.decode()).get("paths", [])

    def _send_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK, content_type: str = "application/json") -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": content_type})

    def _send(self, data: bytes, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
