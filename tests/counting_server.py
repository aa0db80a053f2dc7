"""An HTTP server on the loopback that counts the requests which rewards make, and refuses some of them."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class CountingServer:
    """Answers each POST by JSON.

    Args:
        answer: from the request's body to the answer's.
        headers: further headers of a refusal, which has the status 503.

    Attributes:
        requests: how many there were.
        fails: whether the request of this number, from 1, is refused.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], dict[str, Any]], **headers: str) -> None:
        self.requests = 0
        self.fails: Callable[[int], bool] = lambda number: False
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.requests += 1
                    fails = outer.fails(outer.requests)
                data = json.dumps({"error": {"message": "overloaded"}} if fails else answer(body)).encode()
                self.send_response(503 if fails else 200)
                sent = {"Content-Type": "application/json", "Content-Length": str(len(data))}
                for name, value in (sent | (headers if fails else {})).items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def chat_completion(content: str, *, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """A judge's answer, as an OpenAI-compatible endpoint gives it."""
    return {
        "id": "1", "object": "chat.completion", "created": 0, "model": "grader",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
                  "total_tokens": prompt_tokens + completion_tokens},
    }  # fmt: skip
