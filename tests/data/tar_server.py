"""A server of tars on this machine that gives parts of files and misbehaves as it is told to."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class TarServer:
    """Serves a folder.

    Attributes:
        url: Where it is.
        counts: Requests by file name.
        gives_parts: Whether it answers requests for parts with parts.
        trouble: What goes wrong, in order, each once: `stall` (no answer), `half` (stalls in the middle), `cut` (ends
            there), or a status.
        troubled: The file that it happens to; empty for any.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.gives_parts = True
        self.trouble: list[str | int] = []
        self.troubled = ""
        self.over = threading.Event()
        self.url = ""


@contextmanager
def serve(folder: Path) -> Iterator[TarServer]:
    """Yield a running server of a folder."""
    state = TarServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.partition("?")[0].lstrip("/")
            state.counts[name] += 1
            trouble = state.trouble.pop(0) if state.trouble and state.troubled in name else None
            if trouble == "stall":
                state.over.wait(60)
                self.close_connection = True
                return
            if isinstance(trouble, int) or not (folder / name).is_file():
                self.send_error(trouble if isinstance(trouble, int) else 404)
                return
            content, status = (folder / name).read_bytes(), 200
            asked = self.headers.get("Range")
            whole = len(content)
            if asked and state.gives_parts:
                first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
                content, status = content[first : last + 1], 206 if first < whole else 416
            self.send_response(status)
            if status != 200:
                self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{whole}")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{(folder / name).stat().st_mtime_ns}"')
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if trouble in ("half", "cut") else content)
            if trouble == "half":
                self.wfile.flush()
                state.over.wait(60)
            if trouble in ("half", "cut"):
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        state.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
