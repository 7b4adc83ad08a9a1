"""Real nginx and HAProxy in front of a server, with few kept connections that all clients share."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from telemetry.environment import free_port

from .processes import Child

PROXIES = ("nginx", "haproxy")
_READY_LIMIT_S = 10.0

_NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log info;
events {{ worker_connections 512; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream router {{ server 127.0.0.1:{upstream}; keepalive 2; }}
  server {{
    listen 127.0.0.1:{port};
    proxy_request_buffering off; proxy_buffering off; client_max_body_size 0;
    location / {{ proxy_pass http://router; proxy_http_version 1.1;
      proxy_set_header Connection ""; proxy_set_header Host $host; }}
  }}
}}
"""
_HAPROXY = """
global
  maxconn 512
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
  http-reuse always
  option abortonclose
frontend clients
  bind 127.0.0.1:{port}
  default_backend routers
backend routers
  server router 127.0.0.1:{upstream} maxconn 2
"""


@contextmanager
def proxy_before(upstream: int, kind: str, folder: Path) -> Iterator[int]:
    """The port of a proxy of ``kind`` that passes on to ``upstream``. Skips the test where it is not installed."""
    command = shutil.which(kind) or shutil.which(kind, path="/usr/sbin")
    if command is None:
        pytest.skip(f"{kind} is not installed")
    port = free_port()
    settings = folder / f"{kind}.conf"
    settings.write_text((_NGINX if kind == "nginx" else _HAPROXY).format(folder=folder, upstream=upstream, port=port))
    options = ["-p", folder, "-c", settings] if kind == "nginx" else ["-db", "-f", settings]
    child = Child(kind, [command, *map(str, options)], folder / f"{kind}.log")
    child.start()
    try:
        _await(port, child)
        yield port
    finally:
        child.terminate()


def _await(port: int, child: Child) -> None:
    until = time.monotonic() + _READY_LIMIT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert child.running and time.monotonic() < until, child.log_tail()
            time.sleep(0.02)
        else:
            return
