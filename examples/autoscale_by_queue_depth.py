"""A driver for ``inferq autoscale``: it starts and ends workers as processes of this machine.

    inferq autoscale --pool Qwen/Qwen3-8B --max 4 --driver command -- \
        python examples/autoscale_by_queue_depth.py /var/lib/inferq-workers -- \
        inferq worker --manager-url http://127.0.0.1:18000 --model Qwen/Qwen3-8B

``inferq autoscale`` decides by queue depth how many workers there should be, and runs this script for each step, with
a JSON object on its standard input. The script answers with the ids of the workers that run then. The command after
the second ``--`` starts one worker; the script adds ``--worker-id`` and ``--port 0``. A folder holds a file with the
process id of each worker, and its log.

The script needs nothing but Python. Copy it and change the functions ``start``, ``end`` and ``running`` to your
platform's: an API of a cloud, Nomad, Slurm, a colleague with a pager.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path


def running(folder: Path) -> dict[str, int]:
    """The process ids of the workers that run, by worker id."""
    found = {}
    for file in folder.glob("*.pid"):
        pid = int(file.read_text())
        if is_worker(pid, file.stem):
            found[file.stem] = pid
        else:
            file.unlink()
    return found


def is_worker(pid: int, name: str) -> bool:
    """Whether a process is that worker: it may have ended, and another program may have the number by now."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z" and (not command or name.encode() in command)  # none yet: it was started just now


def start(folder: Path, command: list[str], pool: str) -> None:
    """Start one worker under an id that no worker had before, and remember its process."""
    counter = folder / "count"
    number = int(counter.read_text()) + 1 if counter.exists() else 1
    counter.write_text(str(number))
    name = "".join(sign if sign.isalnum() else "-" for sign in f"example-{pool}")[:40] + f"-{number}"
    with (folder / f"{name}.log").open("ab") as log:  # not our standard output, which the answer goes to
        worker = subprocess.Popen(
            [*command, "--worker-id", name, "--port", "0"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (folder / f"{name}.pid").write_text(str(worker.pid))


def end(pid: int) -> None:
    """End a worker. It has been drained by then, so it runs nothing, and has ended by itself unless it hangs."""
    os.kill(pid, signal.SIGTERM)


def main() -> int:
    parser = argparse.ArgumentParser(description="Starts and ends workers for inferq autoscale --driver command.")
    parser.add_argument("folder", type=Path, help="where process ids and logs are kept")
    parser.add_argument("command", nargs="+", help="how to start one worker, after --")
    options = parser.parse_args()
    order = json.load(sys.stdin)
    options.folder.mkdir(parents=True, exist_ok=True)
    workers = running(options.folder)
    if order["action"] == "scale_to":
        for _ in range(order["count"] - len(workers)):
            start(options.folder, options.command, order["pool"])
    if order["action"] == "remove":
        for name in set(order["workers"]) & workers.keys():
            end(workers[name])
    json.dump({"workers": sorted(running(options.folder))}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
