"""A stand-in for the hub, as far as adapters are read from it, and someone who publishes there.

Prints {"url", "token"}, then does what each line of its input says: `put OWNER/REPOSITORY FOLDER` makes a commit of the
folder's files, `gate OWNER/REPOSITORY` lets nobody without the token read it; and prints `ok`. What it answers is what
the hub's own client takes: it fetches what was put before the `ok`.

As the hub does, it has large files elsewhere, on a server that refuses tokens that are not its own.
"""

import hashlib
import json
import os
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
from huggingface_hub import HfApi, snapshot_download  # noqa: E402

TOKEN = "hf_secret"
MODIFIED = "2026-01-02T03:04:05.000Z"
# {repository: [{path: bytes} of each commit]}.
repositories = {}
gated = set()


def commit_name(number):
    return f"{number:040x}"


def files(repository, revision):
    commits = repositories[repository]
    if revision == "main":
        return commits[-1], commit_name(len(commits))
    for number, commit in enumerate(commits, 1):
        if revision == commit_name(number):
            return commit, revision
    raise KeyError(revision)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"content-length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()


class Store(Handler):
    """Where large files are."""

    def do_GET(self):
        if self.headers["authorization"]:
            return self.answer(400, b"only one way to sign a request is allowed")
        wanted = self.path.strip("/")
        for commits in repositories.values():
            for content in (content for commit in commits for content in commit.values()):
                if hashlib.sha256(content).hexdigest() == wanted:
                    return self.answer(200, content, etag='"another"')
        self.answer(404)


class Hub(Handler):
    def do_GET(self):
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        is_page = parts[:2] == ["api", "models"]
        # A repository's page may be asked for without a revision.
        owner, name, what, revision, *path = (parts[2:] + ["revision", "main"])[:4] if is_page else parts
        repository = f"{owner}/{name}"
        is_known = self.headers["authorization"] == f"Bearer {TOKEN}"
        if self.headers["authorization"] and not is_known:
            return self.answer(401, x_error_message="Invalid credentials in Authorization header")
        if repository not in repositories:
            return self.answer(404 if is_known else 401, x_error_code="RepoNotFound",
                               x_error_message="Repository not found")
        if repository in gated and not is_known:
            return self.answer(401, x_error_code="GatedRepo", x_error_message=f"Access to {repository} is restricted.")
        try:
            commit, sha = files(repository, revision)
        except KeyError:
            return self.answer(404, x_error_code="RevisionNotFound", x_error_message=f"Invalid rev id: {revision}")
        if is_page:
            with_sizes = parse_qs(url.query).get("blobs", ["false"])[0].lower() == "true"
            siblings = [self.sibling(path, content, with_sizes) for path, content in sorted(commit.items())]
            page = {"id": repository, "sha": sha, "lastModified": MODIFIED, "siblings": siblings}
            return self.answer(200, json.dumps(page).encode(), content_type="application/json")
        content = commit.get("/".join(path))
        if what != "resolve" or content is None:
            return self.answer(404, x_error_code="EntryNotFound", x_error_message="Entry not found")
        if not self.is_large("/".join(path)):
            return self.answer(200, content, etag=f'"{self.blob(content)}"', x_repo_commit=sha)
        digest = hashlib.sha256(content).hexdigest()
        self.answer(302, location=f"http://localhost:{store.server_port}/{digest}", x_linked_etag=f'"{digest}"',
                    x_linked_size=len(content), x_repo_commit=sha)

    def sibling(self, path, content, with_sizes):
        told = {"rfilename": path}
        if with_sizes:
            told |= {"size": len(content), "blobId": self.blob(content)}
        if with_sizes and self.is_large(path):
            told["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
        return told

    @staticmethod
    def blob(content):
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @staticmethod
    def is_large(path):
        return path.endswith((".safetensors", ".gguf"))


def check(repository):
    """Fetches it by the hub's own client."""
    commit = repositories[repository][-1]
    info = HfApi(endpoint=url, token=TOKEN).model_info(repository, files_metadata=True)
    assert {s.rfilename: s.size for s in info.siblings} == {path: len(c) for path, c in commit.items()}, info
    with tempfile.TemporaryDirectory() as folder:
        snapshot_download(repository, endpoint=url, token=TOKEN, local_dir=folder, cache_dir=f"{folder}/.cache")
        for path, content in commit.items():
            assert (Path(folder) / path).read_bytes() == content, path


hub, store = (ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (Hub, Store))
for server in (hub, store):
    threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{hub.server_port}"
print(json.dumps({"url": url, "token": TOKEN}), flush=True)
for line in sys.stdin:
    what, repository, *folder = line.rstrip("\n").split(" ", 2)
    if what == "put":
        root = Path(folder[0])
        commit = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        repositories.setdefault(repository, []).append(commit)
        check(repository)
    elif what == "gate":
        gated.add(repository)
    else:
        raise ValueError(line)
    print("ok", flush=True)
