# SPDX-License-Identifier: GPL-2.0
"""An image server that misbehaves: it serves a store as any web server would, and spoils what it is told to."""

import http.server
import os
import re
import threading

FAULTS = ("500", "stop", "wrong")


class Faulty:
    """Serves `store`. The first `times` answers with content of a pack (all of them if None) are spoilt by `fault`:
    500 answers so, `stop` ends the connection in the middle of the content, `wrong` changes a byte of it."""

    def __init__(self, store, fault, times):
        if fault not in FAULTS:
            raise ValueError(fault)
        self.store = os.path.realpath(store)
        self.fault = fault
        self.left = times
        self.spoilt = 0
        self.requests = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            """One connection."""

            protocol_version = "HTTP/1.1"

            def do_GET(self):  # noqa: N802  (the library's name)
                """Answers a request."""
                owner.answer(self)

            def log_message(self, *_):
                """Says nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://10.0.2.2:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _spoils(self, path):
        with self._lock:
            self.requests += 1
            if not path.startswith("/packs/") or self.left == 0:
                return False
            if self.left is not None:
                self.left -= 1
            self.spoilt += 1
            return True

    def answer(self, request):
        """Answers a request, or spoils it."""
        path = os.path.realpath(self.store + request.path)
        if not path.startswith(self.store + "/") or not os.path.isfile(path):
            request.send_error(404)
            return
        size = os.path.getsize(path)
        first, last, status = 0, size - 1, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if asked:
            first, status = int(asked[1]), 206
            last = min(int(asked[2]), last) if asked[2] else last
            if first > last:
                request.send_error(416)
                return
        with open(path, "rb") as f:
            f.seek(first)
            body = f.read(last - first + 1)
        spoil = self.fault if self._spoils(request.path) else None
        if spoil == "500":
            request.send_error(500)
            return
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        if status == 206:
            request.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        request.end_headers()
        if spoil == "stop":
            request.wfile.write(body[:len(body) * 2 // 3])
            request.close_connection = True
            return
        if spoil == "wrong":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 0x55]) + body[middle + 1:]
        request.wfile.write(body)

    def stop(self):
        """Ends it."""
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
