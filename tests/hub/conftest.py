"""A Hugging Face Hub on loopback: the part of its HTTP interface by which huggingface_hub uploads and downloads models."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from modeling_coca import CocaConfig, CocaImageProcessorPil, CocaProcessor, CocaTokenizer

ROOT = Path(__file__).parents[2]
LFS_SUFFIXES = (".safetensors", ".bin")


class LocalHub(ThreadingHTTPServer):
    """
    Git repositories of models in memory. Large files come by the LFS protocol first, then a commit names them.

    Attributes:
        commits: repository -> commit id -> path -> content.
        refs: repository -> branch -> commit id.
        requests: method and path of all that was asked, in order.
        refuse_upload: called with the number of each LFS upload (0, 1, ...); a status code to refuse it with, or `None`.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.uploads = 0
        self.refuse_upload = lambda number: None
        self.lock = threading.Lock()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.commits[repo][self.refs[repo].get(revision, revision)]

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        with self.lock:
            number = len(self.commits.setdefault(repo, {}))
            oid = hashlib.sha1(f"{repo} {number}".encode()).hexdigest()
            self.commits[repo][oid] = files
            self.refs.setdefault(repo, {})[branch] = oid
        return oid

    def handle_error(self, request, client_address):
        """Clients may be killed in these tests."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: bytes | dict | list = b"", status: int = 200, **headers: str) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, code: str, status: int = 404) -> None:
        self.answer({"error": code}, status, X_Error_Code=code)

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path}")
        data = self.body()
        for pattern, handler in self.ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                values = match.groupdict()
                if (repo := values.get("repo")) is not None and repo not in self.server.refs:
                    return self.error("RepoNotFound")
                if "revision" in values:
                    revision = values["revision"] or "main"
                    values["revision"] = self.server.refs[repo].get(revision, revision)
                    if values["revision"] not in self.server.commits[repo]:
                        return self.error("RevisionNotFound")
                return handler(self, data, query, **values)
        return self.error("NoRoute")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, data, query):
        repo = json.loads(data)
        name = f"{repo.get('organization') or 'someone'}/{repo['name']}"
        exists = name in self.server.refs
        if not exists:
            self.server.commit(name, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer({"url": f"{self.server.url}/{name}", "name": name}, 409 if exists else 200)

    def info(self, data, query, repo, revision=None):
        siblings = [{"rfilename": path} for path in self.server.commits[repo][revision]]
        self.answer({"id": repo, "modelId": repo, "sha": revision, "siblings": siblings, "tags": [], "private": False})

    def tree(self, data, query, repo, revision, folder=None):
        files = self.server.commits[repo][revision]
        if folder is not None and not any(path.startswith(f"{folder}/") for path in files):
            return self.error("EntryNotFound")
        return self.answer(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
                if folder is None or path.startswith(f"{folder}/")
            ]
        )

    def resolve(self, data, query, repo, revision, path):
        content = self.server.commits[repo][revision].get(path)
        if content is None:
            return self.error("EntryNotFound")
        etag = hashlib.sha256(content).hexdigest()
        return self.answer(content, ETag=f'"{etag}"', X_Repo_Commit=revision, Accept_Ranges="bytes")

    def preupload(self, data, query, repo, revision):
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(data)["files"]
        ]
        self.answer({"files": modes})

    def lfs_batch(self, data, query, repo):
        objects = []
        for item in json.loads(data)["objects"]:
            if item["oid"] not in self.server.lfs:
                item["actions"] = {
                    "upload": {"href": f"{self.server.url}/lfs/{item['oid']}"},
                    "verify": {"href": f"{self.server.url}/lfs/verify"},
                }
            objects.append(item)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, data, query, oid):
        with self.server.lock:
            number, self.server.uploads = self.server.uploads, self.server.uploads + 1
        if (status := self.server.refuse_upload(number)) is not None:
            return self.error("Refused", status)
        if hashlib.sha256(data).hexdigest() != oid:
            return self.error("WrongContent", 400)
        self.server.lfs[oid] = data
        return self.answer()

    def lfs_verify(self, data, query):
        item = json.loads(data)
        right = len(self.server.lfs.get(item["oid"], b"")) == item["size"]
        self.answer({}, 200 if right else 400)

    def make_commit(self, data, query, repo, revision):
        files = dict(self.server.commits[repo][revision])
        for line in data.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.lfs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        branch = unquote(urlsplit(self.path).path).split("/commit/")[1]
        if "create_pr" in query:
            branch = f"refs/pr/{len(self.server.refs[repo])}"
        oid = self.server.commit(repo, branch, files)
        self.answer(
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self.server.url}/{repo}/commit/{oid}",
                "pullRequestUrl": f"{self.server.url}/{repo}/discussions/1" if "create_pr" in query else None,
            }
        )

    def create_branch(self, data, query, repo, branch):
        self.server.refs[repo][branch] = self.server.refs[repo]["main"]
        self.answer({})

    def validate_yaml(self, data, query):
        self.answer({"errors": [], "warnings": []})

    REPO = r"(?P<repo>[^/]+/[^/]+)"
    ROUTES = [
        (r"POST /api/repos/create", create),
        (r"POST /api/validate-yaml", validate_yaml),
        (rf"POST /api/models/{REPO}/branch/(?P<branch>.+)", create_branch),
        (rf"GET /api/models/{REPO}(?:/revision/(?P<revision>.+))?", info),
        (rf"GET /api/models/{REPO}/tree/(?P<revision>refs/pr/\d+|[^/]+)(?:/(?P<folder>.+))?", tree),
        (rf"(?:GET|HEAD) /{REPO}/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<path>.+)", resolve),
        (rf"POST /api/models/{REPO}/preupload/(?P<revision>.+)", preupload),
        (rf"POST /{REPO}\.git/info/lfs/objects/batch", lfs_batch),
        (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", lfs_upload),
        (r"POST /lfs/verify", lfs_verify),
        (rf"POST /api/models/{REPO}/commit/(?P<revision>.+)", make_commit),
    ]


@pytest.fixture
def hub():
    with LocalHub() as server:
        yield server


@pytest.fixture
def start_python(tmp_path) -> Callable[..., subprocess.Popen]:
    """
    `start_python(code, *args, hub=None, package=True)`: a process with empty caches of its own. Without a hub it is
    offline; without the package `import modeling_coca` fails there, installed or not.
    """

    def start(code: str, *args, hub: LocalHub | None = None, package: bool = True) -> subprocess.Popen:
        hidden = ("HF_", "HUGGING_FACE_", "PYTHON", "TRANSFORMERS_")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        variables |= {"HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
        if hub is None:
            variables["HF_HUB_OFFLINE"] = "1"
        else:
            variables |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        if package:
            start = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
        else:
            start = "import sys; sys.modules['modeling_coca'] = None"
        return subprocess.Popen(
            [sys.executable, "-I", "-c", f"{start}\n{code}", *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=variables,
        )

    return start


@pytest.fixture
def run_python(start_python) -> Callable[..., str]:
    """As `start_python`, waits for the end and returns what was printed."""

    def run(code: str, *args, **kwargs) -> str:
        process = start_python(code, *args, **kwargs)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        if kwargs.get("hub") is None:  # code that was just downloaded is announced
            assert "[transformers]" not in stderr
        return stdout

    return run


@pytest.fixture(scope="session")
def processor(tiny_config) -> CocaProcessor:
    size = tiny_config().vision_config.image_size
    # Bytes only: learned merges would be others in each run
    tokenizer = CocaTokenizer(model_max_length=32).train_new_from_iterator(["a fox"], vocab_size=450, min_frequency=99)
    return CocaProcessor(CocaImageProcessorPil(size=size), tokenizer)


@pytest.fixture(scope="session")
def config(tiny_config, processor) -> Callable[..., CocaConfig]:
    ids = {name: getattr(processor.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 33}
    return lambda **changes: tiny_config(text_config={**size, **ids}, **changes)
