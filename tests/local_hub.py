"""As much of the Hugging Face Hub, on this machine, as it takes to download models and data sets from local folders."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(folders):
    """Serve {"models/owner/name": folder, "datasets/owner/name": folder}; gives the URL for HF_ENDPOINT."""
    handler = type("Handler", (Handler,), {"folders": folders})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        kind, repo, name = "models", None, None
        if resolve := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            kind, repo, name = "datasets" if resolve[1] else "models", resolve[2], resolve[3]
        elif api := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/tree/[^/]+|/revision/[^/]+)?(?:/(.*))?", path):
            kind, repo = api[1], api[2]
        folder = self.folders.get(f"{kind}/{repo}")
        if folder is None:
            return self.answer({}, 404, X_Error_Code="RepoNotFound", X_Error_Message="not found")
        if name:
            if not Path(folder, name).is_file():
                return self.answer({}, 404, X_Error_Code="EntryNotFound", X_Error_Message="not found")
            body = Path(folder, name).read_bytes()
            return self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')
        files = [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
        names = [file.relative_to(folder).as_posix() for file in files]
        if "/tree/" in path:
            oids = [hashlib.sha1(file.read_bytes()).hexdigest() for file in files]
            rows = [(file.stat().st_size, oid) for file, oid in zip(files, oids, strict=True)]
            entries = zip(names, rows, strict=True)
            return self.answer([{"type": "file", "path": name, "size": s, "oid": o} for name, (s, o) in entries])
        siblings = [{"rfilename": name} for name in names]
        return self.answer({"id": repo, "sha": COMMIT, "siblings": siblings, "tags": []})
