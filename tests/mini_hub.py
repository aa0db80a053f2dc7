"""A hub of the tests' own on this machine: files of one folder under any owner's name; some owners answer otherwise.

Standard library only: the hub's client reads its address from the environment when it is imported, after `start`.
"""

import http.server
import os
import threading
import time
from pathlib import Path

ERRORS = {"missing": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "old": (404, "RevisionNotFound")}


class Hub(http.server.BaseHTTPRequestHandler):
    folder, seen = Path(), []

    def do_GET(self):
        self.seen.append(self.path)
        owner, file = self.path.split("/")[1], self.folder / self.path.split("/resolve/main/")[-1]
        if owner in ERRORS:
            return self.answer(ERRORS[owner][0], {"X-Error-Code": ERRORS[owner][1]})
        if owner in ("api", "empty") or not file.is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        if owner == "slow" and not any(path.startswith("/slow") for path in self.seen[:-1]):
            time.sleep(2)  # longer than the client waits for an answer (HF_HUB_ETAG_TIMEOUT below)
        return self.answer(200, {"ETag": f'"{file.name}"', "X-Repo-Commit": "a" * 40}, file.read_bytes())

    do_HEAD = do_GET

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def start(folder, cache) -> http.server.ThreadingHTTPServer:
    Hub.folder = Path(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": cache}
    os.environ |= {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return server
