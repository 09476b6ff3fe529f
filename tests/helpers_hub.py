"""A stand-in for the Hugging Face Hub: the part of its HTTP interface that pushing and loading a folder uses.

huggingface_hub itself talks to it, through HF_ENDPOINT; repositories live in memory, as one commit.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_stand_in"


class Hub:
    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.uploads: dict[str, bytes] = {}  # large files by their hash, before a commit names them
        self.requests: list[str] = []
        self.url = ""

    def environment(self, home) -> dict[str, str]:
        """What makes huggingface_hub in another process use this hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


@contextmanager
def running_hub():
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Unauthorized"}, 401)
        if self.path == "/api/repos/create":
            repo = json.loads(body)
            name = f"{repo['organization']}/{repo['name']}" if repo.get("organization") else repo["name"]
            self.hub.repos.setdefault(name, {})
            return self.answer({"url": f"{self.hub.url}/{name}"})
        if self.path == "/api/validate-yaml":  # the hub refuses cards whose metadata is no YAML
            metadata = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return self.answer({"errors": [] if isinstance(metadata, dict) else ["no metadata"], "warnings": []})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path.partition("?")[0]):
            files = json.loads(body)["files"]
            return self.answer(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        if re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path.partition("?")[0]):
            files = self.hub.repos[match[1]]
            for line in body.decode().splitlines():
                key, value = (json.loads(line)[name] for name in ("key", "value"))
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[value["path"]] = self.hub.uploads[value["oid"]]
            return self.answer(
                {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.url}/{match[1]}/commit/{COMMIT}"}
            )
        return self.answer({"error": f"no {self.path}"}, 404)

    def do_PUT(self):
        body = self.body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.uploads[oid] = body
        self.answer({})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.body()
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", path):
            content = self.hub.repos.get(match[1], {}).get(match[2])
            if content is None:
                code = "EntryNotFound" if match[1] in self.hub.repos else "RepoNotFound"
                return self.answer({"error": code}, 404, {"X-Error-Code": code})
            etag = hashlib.sha256(content).hexdigest()
            return self.answer(content, headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        if match := re.fullmatch(r"/api/models/(.+?)(/revision/[^/]+)?", path):
            if match[1] in self.hub.repos:
                siblings = [{"rfilename": name} for name in self.hub.repos[match[1]]]
                return self.answer({"id": match[1], "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
            return self.answer({"error": "RepoNotFound"}, 404, {"X-Error-Code": "RepoNotFound"})
        return self.answer({"error": f"no {path}"}, 404, {"X-Error-Code": "EntryNotFound"})

    def body(self) -> bytes:
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, content, status=200, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
