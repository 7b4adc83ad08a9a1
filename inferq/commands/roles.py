"""The roles' own programs under one name: ``inferq manager``, ``router``, ``worker``, ``batcher`` and the others.

Their options are those of ``python -m <role>.service``: one for each setting, so nothing is said twice.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from inferq.vllm_setup import find_vllm
from worker.settings import WorkerSettings


def run_manager(arguments: Sequence[str]) -> int:
    """The Manager; gives its exit code."""
    from manager.service import main  # noqa: PLC0415 - a role is loaded only by its own command

    return main(arguments)


def run_router(arguments: Sequence[str]) -> int:
    """The Router; gives its exit code."""
    from router.service import main  # noqa: PLC0415

    return main(arguments)


def run_worker(arguments: Sequence[str]) -> int:
    """A worker; gives its exit code. Without a ``vllm`` on PATH, one that `inferq up` has prepared is its default."""
    from worker.service import main  # noqa: PLC0415

    prepared = find_vllm() if shutil.which("vllm") is None else None
    if prepared is not None:
        os.environ.setdefault(WorkerSettings.variable("vllm_command"), str(prepared.command))
        os.environ.setdefault(WorkerSettings.variable("vllm_device"), prepared.device)
    return main(arguments)


def run_notifier(arguments: Sequence[str]) -> int:
    """A notifier; gives its exit code."""
    from webhooks.service import main  # noqa: PLC0415

    return main(arguments)


def run_autoscaler(arguments: Sequence[str]) -> int:
    """The autoscaler of one pool; gives its exit code."""
    from inferq.autoscale.service import main  # noqa: PLC0415

    return main(arguments)


def run_batcher(arguments: Sequence[str]) -> int:
    """A batcher; gives its exit code."""
    from batches.service import main  # noqa: PLC0415

    return main(arguments)
