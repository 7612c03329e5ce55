"""A web server on 127.0.0.1 that behaves as badly as asked, and writes down every request."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit


class Request(NamedTuple):
    "One line of the server's log: `sent` counts bytes of the body."

    at: float
    path: str
    status: int
    sent: int
    headers: dict[str, str]


class Reply:
    "What a route answers; `trickle` sends the body in pieces with pauses, `promise` overstates its length."

    def __init__(self, body="", status=200, kind="text/html; charset=utf-8", trickle=0.0, promise=0, etag=True, **headers):
        self.body = body.encode() if isinstance(body, str) else body
        self.status, self.trickle, self.promise, self.etag = status, trickle, promise, etag
        self.headers = {"Content-Type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}


class Web:
    "The server: `routes` maps a path to a reply, or to a function of the query; `faults` are answered first, once each."

    def __init__(self) -> None:
        self.routes: dict[str, Reply | Callable[[dict[str, str]], Reply]] = {}
        self.faults: dict[str, list[Reply]] = {}
        self.log: list[Request] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda *parts: None  # a client that hangs up, or was killed
        self.home = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def counts(self) -> Counter:
        "How often each path was asked for."
        return Counter(request.path for request in self.log)

    def reply(self, path: str) -> Reply:
        if self.faults.get(path):
            return self.faults[path].pop(0)
        parts = urlsplit(path)
        route = self.routes.get(path) or self.routes.get(parts.path) or Reply("not here", 404)
        return route(dict(parse_qsl(parts.query))) if callable(route) else route

    def _handler(web) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *parts):
                pass

            def do_GET(self):
                at, reply = time.monotonic(), web.reply(self.path)
                status, body, headers = reply.status, reply.body, dict(reply.headers)
                if reply.etag and status == 200:
                    headers["ETag"] = f'"{hashlib.md5(body).hexdigest()}"'
                    if self.headers.get("If-None-Match") == headers["ETag"]:
                        status, body = 304, b""
                place = len(web.log)
                web.log.append(Request(at, self.path, status, 0, {k.lower(): v for k, v in self.headers.items()}))
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body) + reply.promise)}.items():
                    self.send_header(name, value)
                self.end_headers()
                step = 1 if reply.trickle else 65536
                for start in range(0, len(body), step):
                    self.wfile.write(body[start : start + step])
                    web.log[place] = web.log[place]._replace(sent=start + len(body[start : start + step]))
                    time.sleep(reply.trickle)
                self.close_connection = self.close_connection or bool(reply.promise)

        return Handler
