"""A stand-in for the Hugging Face hub on this machine: what pushing and loading a repository of models asks of it.

It keeps one branch of each repository in memory, and answers uploads in the plain form of Git LFS.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Handler(BaseHTTPRequestHandler):
    repositories: dict[str, dict[str, bytes]]
    objects: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def _address(self) -> str:
        return f"http://localhost:{self.server.server_address[1]}"

    def do_POST(self):
        body, path = self._body(), self.path
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"].rpartition("/")[2])))
            self.repositories.setdefault(name, {})
            self._answer({"url": f"{self._address}/{name}"})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            answers = [
                {**each, "actions": {"upload": {"href": f"{self._address}/lfs/{each['oid']}"}}} for each in asked
            ]
            self._answer({"transfer": "basic", "objects": answers})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            answers = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for each in files
            ]
            self._answer({"files": answers})
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in body.decode().splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    content = base64.b64decode(item["value"]["content"])
                    self.repositories[name][item["value"]["path"]] = content
                elif item["key"] == "lfsFile":
                    self.repositories[name][item["value"]["path"]] = self.objects[item["value"]["oid"]]
            self._answer({"commitUrl": f"{self._address}/{name}/commit/{'a' * 40}", "commitOid": "a" * 40})
        else:
            self._answer({}, 404)

    def do_PUT(self):
        self.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer(b"")

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/":
            self._answer(b"")
        elif path == "/api/whoami-v2":
            self._answer({"name": "me", "type": "user", "orgs": []})
        elif path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/").partition("/revision/")[0].partition("/tree/")[0]
            files = self.repositories.get(name)
            if files is None:
                self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            elif "/tree/" in path:
                self._answer([{"type": "file", "path": each, "size": len(files[each]), "oid": "0"} for each in files])
            else:
                siblings = [{"rfilename": each} for each in files]
                self._answer({"id": name, "modelId": name, "sha": "a" * 40, "siblings": siblings, "tags": []})
        elif "/resolve/" in path:
            name, _, rest = path[1:].partition("/resolve/")
            content = self.repositories.get(name, {}).get(rest.partition("/")[2])
            if content is None:
                self._answer({}, 404, X_Error_Code="EntryNotFound")
            else:
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self._answer(content, ETag=etag, X_Repo_Commit="a" * 40, Accept_Ranges="none")
        else:
            self._answer({}, 404)

    do_HEAD = do_GET


@contextmanager
def local_hub():
    """Its address, and its repositories: the contents of files by repository and name."""
    repositories: dict[str, dict[str, bytes]] = {}
    handler = type("Handler", (_Handler,), {"repositories": repositories, "objects": {}})
    server = ThreadingHTTPServer(("localhost", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://localhost:{server.server_address[1]}", repositories
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
