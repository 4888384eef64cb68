"""As much of the Hugging Face Hub as the script needs, on this machine: downloads, and pushes into `Hub.pushed`."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `folders`, {"models/owner/name": folder, "datasets/owner/name": folder}, at `endpoint` until `close()`."""

    def __init__(self, folders):
        self.folders = {repo: Path(folder) for repo, folder in folders.items()}
        self.pushed = {}
        self.asked = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status=200, body=b"", headers=()):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code):
        self.answer(404, {"error": "not found"}, {"X-Error-Code": code, "X-Error-Message": "not found"})

    def files(self, repo):
        folder = self.hub.folders[repo]
        return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        self.hub.asked.append(f"{self.command} {self.path}")
        if resolve := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            repo = f"{'datasets' if resolve[1] else 'models'}/{resolve[2]}"
            if repo not in self.hub.folders:
                return self.missing("RepoNotFound")
            if resolve[3] not in self.files(repo):
                return self.missing("EntryNotFound")
            body = self.files(repo)[resolve[3]].read_bytes()
            return self.answer(200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"'})
        if info := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+?)(/revision/[^/]+)?", path):
            if info[1] not in self.hub.folders:
                return self.missing("RepoNotFound")
            siblings = [{"rfilename": name} for name in self.files(info[1])]
            return self.answer(200, {"id": info[1].split("/", 1)[1], "sha": COMMIT, "siblings": siblings, "tags": []})
        if tree := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", path):
            if tree[1] not in self.hub.folders:
                return self.missing("RepoNotFound")
            found = {name: file for name, file in self.files(tree[1]).items() if name.startswith(tree[2] or "")}
            oid = {name: hashlib.sha1(name.encode()).hexdigest() for name in found}
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": oid[name]}
                for name, file in found.items()
            ]
            return self.answer(200, entries) if entries or not tree[2] else self.missing("EntryNotFound")
        return self.missing("EntryNotFound")

    def do_POST(self):
        self.hub.asked.append(f"{self.command} {self.path}")
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "/gone/" in self.path:  # this repository can be made, and then is no more
            return self.answer(410, {"error": "gone"})
        if self.path == "/api/repos/create":
            if "Authorization" not in self.headers:
                return self.answer(401, {"error": "Invalid username or password."})
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            return self.answer(200, {"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/[^/]+", self.path):
            asked = json.loads(body)["files"]
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            return self.answer(200, {"files": files})
        if commit := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", self.path):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.hub.pushed.setdefault(commit[1], {})[entry["value"]["path"]] = content
            url = f"{self.hub.endpoint}/{commit[1]}/commit/{COMMIT}"
            return self.answer(200, {"success": True, "commitUrl": url, "commitOid": COMMIT})
        if info := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)/paths-info/[^/]+", self.path):
            if info[1] not in self.hub.folders:
                return self.missing("RepoNotFound")
            paths = json.loads(body)["paths"] if body.startswith(b"{") else re.findall(r"paths=([^&]*)", body.decode())
            return self.answer(200, [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                for name, file in self.files(info[1]).items() if name in paths
            ])  # fmt: skip
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        return self.missing("EntryNotFound")
