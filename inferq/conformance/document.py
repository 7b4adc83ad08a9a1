"""``docs/worker-protocol.openapi.json``: the worker protocol's part of the Router's OpenAPI document.

``python -m inferq.conformance.document`` prints it, ``--write`` puts it into the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from broker import BrokerSettings
from queue_schemas.worker_protocol.fields import WORKER_PREFIX
from router import RouterSettings, build_router
from router.composition import build_web_app
from storage import StorageSettings

DOCUMENT = Path(__file__).parents[2] / "docs" / "worker-protocol.openapi.json"
_NOWHERE = "redis://127.0.0.1:1/0"
_SCHEMAS = "#/components/schemas/"


def protocol_document() -> dict[str, Any]:
    """The paths of workers over HTTP, and the schemas that they refer to. Connects to nothing."""
    settings = RouterSettings.load(join_token="a token", worker_credentials_file="")  # noqa: S106 - so that one is asked for
    router = build_router(
        settings, BrokerSettings.load(redis_url=_NOWHERE), StorageSettings.load(url="memory://worker-protocol")
    )
    whole = build_web_app(router.services).openapi()
    paths = {path: methods for path, methods in whole["paths"].items() if path.startswith(WORKER_PREFIX)}
    found: dict[str, Any] = {}
    _collect(paths, whole["components"]["schemas"], found)
    components = {"schemas": dict(sorted(found.items())), "securitySchemes": whole["components"]["securitySchemes"]}
    info = {"title": "inferq worker protocol", "version": "1", "description": "See docs/worker-protocol.md."}
    return {"openapi": whole["openapi"], "info": info, "paths": paths, "components": components}


def _collect(node: Any, schemas: dict[str, Any], found: dict[str, Any]) -> None:
    """Add to ``found`` what ``node`` refers to."""
    if isinstance(node, list):
        for item in node:
            _collect(item, schemas, found)
    elif isinstance(node, dict):
        name = str(node.get("$ref", "")).removeprefix(_SCHEMAS)
        if name in schemas and name not in found:
            found[name] = schemas[name]
            _collect(schemas[name], schemas, found)
        for value in node.values():
            _collect(value, schemas, found)


def render() -> str:
    """The document as the file has it."""
    return json.dumps(protocol_document(), indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Print the document or write it."""
    parser = argparse.ArgumentParser(description="The worker protocol's OpenAPI document.")
    parser.add_argument("--write", action="store_true", help="put it into docs/worker-protocol.openapi.json")
    if parser.parse_args().write:
        DOCUMENT.write_text(render())
    else:
        sys.stdout.write(render())
    return 0


if __name__ == "__main__":
    sys.exit(main())
