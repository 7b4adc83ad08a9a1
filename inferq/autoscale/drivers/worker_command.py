"""How the drivers that start workers themselves name them, and what they start them with."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence

from inferq import __version__

from ..settings import AutoscaleSettings

_MODEL_FLAGS = ("--model", "--engine-url", "--served-model-name")
_MAX_PART = 18


def pool_name(pool: str) -> str:
    """``pool`` as a part of names of workers and files, another one for each pool."""
    name = _plain(pool)
    return name if name == pool and len(name) <= _MAX_PART else f"{name[:_MAX_PART]}-{_mark(pool)}"


def id_prefix(pool: str, place: str) -> str:
    """What the ids of workers for ``pool`` begin with that are started at ``place``; a number follows."""
    return f"auto-{pool_name(pool)}-{_plain(place)[:_MAX_PART]}"


def worker_mark(settings: AutoscaleSettings) -> str:
    """A part of workers' ids that changes with whatever makes other workers: what they are started with, the resources
    kept for them, our version."""
    content = [
        __version__,
        worker_args(settings, ""),
        settings.ray_cpus,
        settings.ray_gpus,
        *join_token(settings).values(),
    ]
    return _mark(json.dumps(content))


def worker_args(settings: AutoscaleSettings, worker_id: str) -> list[str]:
    """Options of ``inferq worker``: the operator's, and what they leave open."""
    args = [*settings.args, "--worker-id", worker_id, "--port", "0"]
    if not _has(settings.args, ("--manager-url",)):
        args += [part for url in settings.manager_urls for part in ("--manager-url", url)]
    if not _has(settings.args, _MODEL_FLAGS):
        args += ["--model", settings.pool]
    return args


def worker_environment(settings: AutoscaleSettings) -> Mapping[str, str]:
    """This process's environment, and the join token."""
    return {**os.environ, **join_token(settings)}


def join_token(settings: AutoscaleSettings) -> Mapping[str, str]:
    """The variable that gives a worker the join token: options show in process lists."""
    token = settings.join_token.get_secret_value()
    return {"INFERQ_JOIN_TOKEN": token} if token else {}


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "any"


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _has(args: Sequence[str], flags: Sequence[str]) -> bool:
    return any(part.split("=")[0] in flags for part in args)
