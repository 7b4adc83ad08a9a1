"""An HTTP proxy that refuses and records each request, to show that calls go direct."""

from __future__ import annotations

import socketserver
import threading
from types import TracebackType
from typing import Self


class RecordingProxy:
    """Listens on loopback, notes the first line of every request, and answers 502::

    with RecordingProxy() as proxy:
        ...  # with proxy.env in the environment
        assert proxy.asked == []
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(socketserver.StreamRequestHandler):
            timeout = 5

            def handle(self) -> None:
                try:
                    asked.append(self.rfile.readline(2_000).decode("latin-1").strip())
                except TimeoutError:  # somebody looked whether the port is taken
                    return
                self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def env(self) -> dict[str, str]:
        """Every variable by which programs are told of a proxy."""
        url = f"http://127.0.0.1:{self._server.server_address[1]}"
        names = ("http_proxy", "https_proxy", "all_proxy")
        return {spelt: url for name in names for spelt in (name, name.upper())} | {"no_proxy": "", "NO_PROXY": ""}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
