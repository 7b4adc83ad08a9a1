"""Real nginx and HAProxy in front of a server: with few kept connections that all clients share, or with TLS before
Routers as the guide has it (examples/clouds)."""

from __future__ import annotations

import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from telemetry.environment import free_port

from .processes import Child
from .servers import Certificates

PROXIES = ("nginx", "haproxy")
_EXAMPLES = Path(__file__).parents[2] / "examples" / "clouds"
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


_NGINX_AROUND = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log info;
events {{ worker_connections 512; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  include {site};
}}
"""


@contextmanager
def proxy_before(upstream: int, kind: str, folder: Path) -> Iterator[int]:
    """The port of a proxy of ``kind`` that passes on to ``upstream``. Skips the test where it is not installed."""
    port = free_port()
    settings = folder / f"{kind}.conf"
    settings.write_text((_NGINX if kind == "nginx" else _HAPROXY).format(folder=folder, upstream=upstream, port=port))
    with _running(kind, settings, port, folder):
        yield port


@contextmanager
def tls_before(
    routers: Sequence[int], kind: str, folder: Path, certificates: Certificates, clients_ca: Path | None = None
) -> Iterator[int]:
    """The port of a proxy with the guide's settings before Routers, of which only addresses and paths are others.
    ``clients_ca``: callers need a certificate of it, as where the lines for mutual TLS are switched on."""
    port = free_port()
    settings = folder / f"{kind}-tls.conf"
    (folder / "server.pem").write_text(certificates.cert.read_text() + certificates.key.read_text())
    text = (_EXAMPLES / ("nginx.conf" if kind == "nginx" else "haproxy.cfg")).read_text()
    if clients_ca is not None and kind == "nginx":
        text = re.sub(r"# (ssl_(?:client_certificate|verify_client) )", r"\1", text)
    elif clients_ca is not None:
        text = re.sub(r"\n +bind .*\n", "\n", text, count=1).replace("# bind", "bind")
    servers = re.findall(r".*10\.0\.0\.1[12]:.*\n", text)
    for line in dict.fromkeys(servers):
        own = [re.sub(r"10\S+:18000", f"127.0.0.1:{router}", line) for router in routers]
        own = [one.replace("router-1", f"router-{number}") for number, one in enumerate(own, 1)]
        text = text.replace(line, "".join(own) if "0.11:" in line else "")
    names = {"server.pem": folder / "server.pem", "server.key": certificates.key, "workers-ca.crt": clients_ca or ""}
    for name, path in names.items():
        text = text.replace(f"/etc/inferq/tls/{name}", str(path))
    text = (
        text.replace("maxconn 20000", "maxconn 512")
        .replace("listen 443", f"listen 127.0.0.1:{port}")
        .replace("bind :443", f"bind 127.0.0.1:{port}")
    )
    settings.write_text(text)
    if kind == "nginx":
        settings = folder / "nginx-around.conf"
        settings.write_text(_NGINX_AROUND.format(folder=folder, site=folder / f"{kind}-tls.conf"))
    with _running(kind, settings, port, folder):
        yield port


@contextmanager
def _running(kind: str, settings: Path, port: int, folder: Path) -> Iterator[None]:
    command = shutil.which(kind) or shutil.which(kind, path="/usr/sbin")
    if command is None:
        pytest.skip(f"{kind} is not installed")
    options = ["-p", folder, "-c", settings] if kind == "nginx" else ["-db", "-f", settings]
    child = Child(kind, [command, *map(str, options)], folder / f"{kind}.log")
    child.start()
    try:
        _await(port, child)
        yield
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
