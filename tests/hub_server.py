"""A server that speaks the part of the Hub's API that `huggingface_hub` uses to push models and to load them."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from transformers.pipelines import PIPELINE_REGISTRY

LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "other")
NAME = r"(?:[\w-]+/)?[\w.-]+"


def problems_of(card: str) -> list[str]:
    """What the Hub refuses in the header of a model's card, as far as ours could get it wrong."""
    found = REGEX_YAML_BLOCK.search(card)
    fields = yaml.safe_load(found[2]) if found else {}
    if not isinstance(fields, dict):
        return ["the header is no mapping"]

    def listed(name: str) -> list[str]:
        value = fields.get(name, [])
        return [str(each) for each in (value if isinstance(value, list) else [value])]

    problems = [f"license {each!r}" for each in listed("license") if each not in LICENSES]
    tasks = PIPELINE_REGISTRY.get_supported_tasks()
    problems += [f"pipeline_tag {each!r}" for each in listed("pipeline_tag") if each not in tasks]
    for name, pattern in (("base_model", NAME), ("datasets", NAME), ("language", "[a-z]{2,3}")):
        problems += [f"{name} {each!r}" for each in listed(name) if not re.fullmatch(pattern, each, re.ASCII)]
    for model in fields.get("model-index", []):
        for result in model["results"]:
            metrics = result.get("metrics") or [{}]
            is_whole = result.get("task", {}).get("type") and result.get("dataset", {}).get("name")
            is_named = re.fullmatch(NAME, result.get("dataset", {}).get("type", ""), re.ASCII)
            if not (is_whole and is_named and all({"type", "value"} <= set(each) for each in metrics)):
                problems.append(f"model-index {result!r}")
    return problems


@dataclass
class Repository:
    """Commits in order, each with all of its files; branches and tags name one of them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, files: dict[str, bytes], deleted: Collection[str] = ()) -> str:
        previous = self.commits.get(self.references.get(branch, ""), {})
        kept = {name: data for name, data in previous.items() if name not in deleted}
        number = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[number] = {**kept, **files}
        self.references[branch] = number
        return number

    def commit_of(self, revision: str) -> str | None:
        return self.references.get(revision, revision if revision in self.commits else None)


class Hub:
    """
    What the server holds, for tests to look at, Spaces as `spaces/user/name`; and whether it drops large uploads
    half-way.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.refuses_uploads = False
        self.address = ""

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.references[revision]]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: str) -> None:
        self.answer({"error": code}, 404, **{"X-Error-Code": code, "X-Error-Message": code})

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if asked.get("type") == "space":
                repo_id = f"spaces/{repo_id}"
            if repo_id in self.hub.repositories:
                return self.answer({"url": f"{self.hub.address}/{repo_id}"}, 409)
            repository = self.hub.repositories[repo_id] = Repository()
            repository.add("main", {".gitattributes": b""})
            return self.answer({"url": f"{self.hub.address}/{repo_id}"})
        if path == "/api/validate-yaml":
            problems = problems_of(json.loads(body)["content"])
            return self.answer(
                {"errors": [{"message": each} for each in problems], "warnings": []}, 400 if problems else 200
            )
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = []
            for each in json.loads(body)["objects"]:
                upload = {"href": f"{self.hub.address}/objects/{each['oid']}", "header": {}}
                objects.append(
                    {**each, **({} if each["oid"] in self.hub.objects else {"actions": {"upload": upload}})}
                )
            return self.answer({"transfer": "basic", "objects": objects})
        found = re.fullmatch(
            r"/api/((?:spaces/)?[^/]+/[^/]+)/(preupload|commit|branch|tag)/(.+)", path.replace("/models/", "/", 1)
        )
        if found is None or found[1] not in self.hub.repositories:
            return self.refuse("RepoNotFound")
        repository, revision = self.hub.repositories[found[1]], unquote(found[3])
        if found[2] == "preupload":
            asked = json.loads(body)
            ignored = set(asked.get("gitIgnore", "").split())
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": each["path"].rsplit("/", 1)[-1] in ignored,
                }
                for each in asked["files"]
            ]
            return self.answer({"files": modes})
        if found[2] in ("branch", "tag"):
            if revision in repository.references:
                return self.answer({"error": "it exists"}, 409)
            repository.references[revision] = repository.references["main"]
            return self.answer({})
        files: dict[str, bytes] = {}
        deleted: set[str] = set()
        for line in body.splitlines():
            kind, value = (entry := json.loads(line))["key"], entry["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile":
                deleted.add(value["path"])
            elif kind != "header":
                return self.answer({"error": f"unknown operation {kind!r}"}, 400)
        number = repository.add(revision, files, deleted)
        return self.answer({"commitUrl": f"{self.hub.address}/{found[1]}/commit/{number}", "commitOid": number})

    def do_PUT(self) -> None:
        data = self.body()
        if self.hub.refuses_uploads:
            # Not dropped, which the client would try again and again, and wait longer each time
            return self.answer({}, 403)
        self.hub.objects[hashlib.sha256(data).hexdigest()] = data
        return self.answer({})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": "me", "orgs": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)/?(.*))?", path):
            commit = self.commit_of(found[1], found[3] or "main")
            if commit is None:
                return None
            files = self.hub.repositories[found[1]].commits[commit]
            if found[2] == "tree":
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                    if name.startswith(found[4])
                ]
                return self.answer(entries) if entries else self.refuse("EntryNotFound")
            siblings = [{"rfilename": name} for name in files]
            return self.answer(
                {"id": found[1], "modelId": found[1], "sha": commit, "siblings": siblings, "private": False}
            )
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            commit = self.commit_of(found[1], found[2])
            if commit is None:
                return None
            data = self.hub.repositories[found[1]].commits[commit].get(found[3])
            if data is None:
                return self.refuse("EntryNotFound")
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
            return self.answer(data, **headers)
        return self.refuse("RepoNotFound")

    do_HEAD = do_GET

    def commit_of(self, repo_id: str, revision: str) -> str | None:
        """Its number, or None where the client has been told that there is none."""
        if repo_id not in self.hub.repositories:
            self.refuse("RepoNotFound")
            return None
        commit = self.hub.repositories[repo_id].commit_of(revision)
        if commit is None:
            self.refuse("RevisionNotFound")
        return commit


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("localhost", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.address = f"http://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
