"""``inferq up``: run everything on this machine until Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

from rich.markup import escape
from rich.status import Status

from broker import BrokerSettings
from broker.rq.queues import rq_connection
from inferq.console import err, out, print_json
from inferq.stack import RunningStack, StackOptions, plan_stack, run_stack
from inferq.vllm_setup import (
    DEFAULT_MODEL,
    ConsoleProgress,
    Kind,
    Progress,
    VllmEnvironment,
    prepare_default_model,
    prepare_vllm,
)
from queue_schemas import CannotStart
from telemetry.environment import HeldPorts
from telemetry.files import absolute_path
from telemetry.http.server import run_process, stop_on_signals

SIMULATED_MODEL = "sim"
DEFAULT_MODEL_CONTEXT = "2048"
"""Longest context of the default model on a CPU, in tokens: enough to try things, and quick to start."""
_REPEAT_S = 10.0


@dataclass(frozen=True, slots=True)
class Serving:
    """What the workers will run: their options, the model's name (empty: the engine decides), and the engine's."""

    options: StackOptions
    model: str
    engine: str


def prepare(options: StackOptions, progress: Progress) -> Serving:
    """Make sure that the engine of ``options`` is there, installing vLLM if need be.

    Raises ``SetupFailed`` with the reason why it cannot be, and what to do instead.
    """
    with _ended_by_sigterm():
        return _prepare(options, progress)


def _prepare(options: StackOptions, progress: Progress) -> Serving:
    if options.engine == "sim":
        model = options.model or SIMULATED_MODEL
        return Serving(replace(options, model=model), model, "simulated engine")
    if options.engine == "url":
        return Serving(options, options.model or "", f"the server at {options.engine_url}")
    environment = _own_vllm(options) or prepare_vllm(progress)
    options = replace(options, vllm_command=str(environment.command), vllm_device=environment.device)
    if environment.kind is Kind.CPU:
        options = replace(options, engine_threads=share_of_cores(os.cpu_count() or 1, options.workers))
    name = f"vLLM on the {environment.device.upper()}"
    if options.model:
        return Serving(options, options.served_model_name or options.model, name)
    folder = prepare_default_model(environment, progress)
    arguments = options.vllm_args
    if environment.kind is Kind.CPU and "--max-model-len" not in arguments:
        arguments = ("--max-model-len", DEFAULT_MODEL_CONTEXT, *arguments)
    served = options.served_model_name or DEFAULT_MODEL
    return Serving(replace(options, model=str(folder), served_model_name=served, vllm_args=arguments), served, name)


def share_of_cores(cores: int, engines: int) -> int:
    """Threads for each engine. One core is left to everything else: OpenMP's threads wait for each other by spinning,
    so that an engine with one thread too many is ten times slower, not a little."""
    return max(1, (cores - 1) // max(1, engines))


def bring_up(options: StackOptions, *, redis_url: str | None, as_json: bool) -> int:
    """Run the fabric until SIGINT or SIGTERM; the exit code. Raises errors of ours, each a sentence."""
    began = time.monotonic()
    serving = prepare(options, ConsoleProgress(err))
    link_environment(serving.options)
    queue_url = BrokerSettings.load(redis_url=redis_url).redis_url
    announcer = TerminalAnnouncer(serving, as_json=as_json, set_up_s=time.monotonic() - began)

    async def run() -> None:
        with HeldPorts() as ports, stop_on_signals(hurry := asyncio.Event()) as stop, announcer:
            plan = plan_stack(with_batcher(serving.options, queue_url), ports.take)
            await run_stack(plan, announcer, stop, redis_url=queue_url, hurry=hurry)
            announcer.stopped(plan.data_dir)

    return run_process(run)


def with_batcher(options: StackOptions, queue_url: str) -> StackOptions:
    """Batches are run and webhooks sent too, unless the queue's Redis is none that RQ can use and there is no other."""
    if not queue_url:
        return options  # the embedded one will do
    try:
        rq_connection(BrokerSettings.load(redis_url=queue_url)).close()
    except CannotStart as error:
        err.print(f"[yellow]Batches and webhooks will wait: nothing runs them.[/yellow] {escape(error.message)}")
        return replace(options, batcher=False)
    return options


def link_environment(options: StackOptions) -> None:
    """Let ``python -m worker.service``, started by hand in this folder, find the prepared vLLM too."""
    if options.vllm_command is None:
        return
    link = absolute_path(options.data_dir) / "vllm"
    target = Path(options.vllm_command).parent.parent
    if link.is_symlink() and link.readlink() != target:
        link.unlink()
    if not link.exists() and not link.is_symlink():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)


class TerminalAnnouncer:
    """Prints what starts, runs, fails and stops; for scripts one line of JSON once everything runs."""

    def __init__(self, serving: Serving, *, as_json: bool, set_up_s: float = 0.0) -> None:
        self._serving = serving
        self._as_json = as_json
        self._set_up_s = set_up_s
        self._status: Status | None = None
        self._told = ("", 0.0)

    def __enter__(self) -> None:
        if err.is_terminal:
            self._status = err.status("starting ...")
            self._status.start()

    def __exit__(self, *_: object) -> None:
        self._still()

    def starting(self, what: str) -> None:
        text = _readable(what)
        now = time.monotonic()
        part = text.partition(":")[0]
        if self._status is not None:
            self._status.update(escape(text))
        elif part != self._told[0] or now - self._told[1] > _REPEAT_S:
            self._told = (part, now)
            err.print(f"starting {escape(text)}")

    def trouble(self, role: str, text: str) -> None:
        for line in text.splitlines():
            err.print(f"[red]{escape(role)}[/red] {escape(line)}")

    def up(self, stack: RunningStack) -> None:
        self._still()
        if self._as_json:
            facts = asdict(stack) | {"logs": str(stack.logs), "model": self._serving.model or stack.first_model}
            print_json(facts, line=True)
        else:
            self._print_table(stack)

    def stopping(self, what: str) -> None:
        if err.is_terminal and self._status is None:
            err.print()
            self._status = err.status("stopping ...")
            self._status.start()
        if self._status is not None:
            self._status.update(f"stopping {what} ...")

    def stopped(self, data_dir: Path) -> None:
        """Everything has ended."""
        self._still()
        err.print(f"Stopped. The next `inferq up` continues on the data in {escape(str(data_dir))}.")

    def _still(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _print_table(self, stack: RunningStack) -> None:
        model = self._serving.model or stack.first_model
        out.print(f"\n[bold green]inferq is up[/bold green] after {stack.ready_after_s + self._set_up_s:.0f} s\n")
        rows = [("Router", f"{stack.router_url}/v1  (OpenAI API)"), ("Manager", stack.manager_url)]
        rows += [(name.capitalize(), url) for name, url in stack.service_urls.items()]
        rows += [(name.capitalize(), f"{url}  ({self._serving.engine})") for name, url in stack.worker_urls.items()]
        rows += [
            ("Model", model or f"not known: GET {stack.router_url}/v1/models lists the models"),
            ("Queue", stack.queue),
            ("Logs", str(stack.logs)),
        ]
        if stack.join_token_file:
            rows.append(("Join token", f"{stack.join_token_file}  (for workers and operators: INFERQ_JOIN_TOKEN)"))
        for name, text in rows:
            out.print(f"  [bold]{name:<11}[/bold]{escape(text)}")
        body = json.dumps(
            {"model": model or "MODEL", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
        )
        out.print("\nTry:\n")
        out.print(
            f"  curl {stack.router_url}/v1/chat/completions -H 'content-type: application/json' \\\n    -d '{body}'",
            markup=False,
        )
        out.print("\nCtrl-C stops all of it.\n")


def _own_vllm(options: StackOptions) -> VllmEnvironment | None:
    """The vLLM that the user named, instead of one of ours."""
    if options.vllm_command is None:
        return None
    command = absolute_path(options.vllm_command)
    if not command.exists():
        raise CannotStart(f"there is no {command}: correct --vllm-command")
    python = command.with_name("python")
    if not options.model and not python.exists():
        raise CannotStart(
            f"name a model with --model: {command} has no Python beside it to convert the default one with"
        )
    kind = Kind.CUDA if options.vllm_device == "gpu" else Kind.CPU
    return VllmEnvironment(kind, python, command)


def _readable(what: str) -> str:
    """``worker-1: {"reasons": [...]}`` as a sentence."""
    role, _, rest = what.partition(": ")
    try:
        page = json.loads(rest)
    except ValueError:
        return what
    reasons = page.get("reasons") if isinstance(page, dict) else None
    return f"{role}: {'; '.join(map(str, reasons))}" if reasons else role


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM as an exception, so that what the set-up started is ended with it."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
