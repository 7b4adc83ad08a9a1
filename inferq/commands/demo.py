"""``inferq demo``: one chat, one streamed chat, twenty prompts at once, printed to be read."""

from __future__ import annotations

import asyncio
import gzip
import importlib.resources
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from broker import BrokerSettings
from inferq.chat.client import Answer, ChatClient
from inferq.console import err, out, print_json
from inferq.stack import RunningStack, StackOptions, StackPlan, plan_stack, run_stack
from inferq.vllm_setup import ConsoleProgress
from queue_schemas import BadRequest, ShuttingDown
from telemetry.environment import HeldPorts
from telemetry.http.server import run_process, stop_on_signals

from ..chat.views import choose_model, describe
from .up import Serving, TerminalAnnouncer, prepare

PROMPTS = 20
QUESTION = "What is the capital of France?"
STORY = "Tell me in two sentences what a message queue is good for."
_ANSWER_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of the batch and what people call it."""

    name: str
    text: str


def read_prompts(path: Path | None, limit: int = PROMPTS) -> list[Prompt]:
    """The first ``limit`` prompts of a file (``.jsonl`` or ``.jsonl.gz``; ``task_id`` or ``name``, and ``prompt``);
    without a path, twenty of our own, which come with the package.

    Raises ``BadRequest`` if the file cannot be read.
    """
    try:
        if path is None:
            data = importlib.resources.files("inferq").joinpath("data", "prompts.jsonl").read_bytes()
        else:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = [orjson.loads(line) for line in data.splitlines() if line.strip()][:limit]
        return [Prompt(str(line.get("task_id") or line["name"]), _instruction(line)) for line in lines]
    except (OSError, EOFError, KeyError, TypeError, AttributeError, orjson.JSONDecodeError) as error:
        raise BadRequest(f"{path} cannot be read as prompts ({error})") from error


def run_demo(
    client: ChatClient, options: StackOptions, prompts: list[Prompt], *, redis_url: str | None, as_json: bool
) -> int:
    """Show a fabric at work: the one that ``client`` reaches, else one started for the demo and stopped after it.

    Gives the exit code. Raises errors of ours, each a sentence.
    """
    if asyncio.run(_is_running(client)):
        err.print(f"Using the fabric at {client.url}.")
        return run_process(lambda: _show(client, prompts, options.model or "", as_json=as_json))
    err.print(f"No fabric answers at {client.url}: starting one for the demo.")
    # Unless set, ports are free ones, and the data folder is its own: the demo leaves everything else that runs alone.
    options = replace(
        options,
        router_port=options.router_port or 0,
        manager_port=options.manager_port or 0,
        worker_port=options.worker_port or 0,
        data_dir=options.data_dir / "demo",
    )
    serving = prepare(options, ConsoleProgress(err))
    queue_url = BrokerSettings.load(redis_url=redis_url).redis_url

    async def show() -> None:
        # Nothing in it is a batch.
        alone = replace(serving, options=replace(serving.options, batcher=False))
        async with _own_stack(alone, queue_url) as url:
            await _show(ChatClient(url), prompts, as_json=as_json)

    return run_process(show)


async def _is_running(client: ChatClient) -> bool:
    async with client:
        return await client.health()


@asynccontextmanager
async def _own_stack(serving: Serving, redis_url: str) -> AsyncIterator[str]:
    """A running stack; gives the Router's URL. SIGINT and SIGTERM cut the caller short and stop the stack in order."""
    announcer = _QuietAnnouncer(serving, as_json=True)
    done = False

    async def keep(plan: StackPlan, stop: asyncio.Event) -> None:
        await run_stack(plan, announcer, stop, redis_url=redis_url)
        if not done:
            raise ShuttingDown("the demo was stopped")

    with HeldPorts() as ports, stop_on_signals() as stop, announcer:
        plan = plan_stack(serving.options, ports.take)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(keep(plan, stop), name="stack")
            await announcer.ready.wait()
            yield plan.router.url
            done = True
            stop.set()


class _QuietAnnouncer(TerminalAnnouncer):
    """Tells of the start only; ``ready`` is set when everything runs."""

    ready: asyncio.Event

    def __enter__(self) -> None:
        super().__enter__()
        self.ready = asyncio.Event()

    def up(self, stack: RunningStack) -> None:
        self._still()
        err.print(f"Ready after {stack.ready_after_s:.0f} s.")
        self.ready.set()


async def _show(client: ChatClient, prompts: list[Prompt], named: str = "", *, as_json: bool) -> None:
    async with client:
        await _show_all(client, prompts, named, as_json=as_json)


async def _show_all(client: ChatClient, prompts: list[Prompt], named: str, *, as_json: bool) -> None:
    model = named or await choose_model(client)
    chat = await _plain(client, model, as_json=as_json)
    streamed = await _streamed(client, model, as_json=as_json)
    began = time.monotonic()
    answers = await _together(client, model, prompts, as_json=as_json)
    took = time.monotonic() - began
    if as_json:
        together = [{"name": prompt.name} | describe(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        print_json({"model": model, "chat": describe(chat), "stream": describe(streamed), "together": together})
    else:
        _print_summary(prompts, answers, took)


async def _plain(client: ChatClient, model: str, *, as_json: bool) -> Answer:
    if not as_json:
        out.print(f"\n[bold]1. A chat[/bold] with {escape(model)}\n\n  [cyan]you[/cyan]    {QUESTION}")
    answer = await client.chat(model, [{"role": "user", "content": QUESTION}], max_tokens=48, temperature=0)
    if not as_json:
        out.print(f"  [green]model[/green]  {escape(_one_line(answer.text))}")
        out.print(f"         [dim]{_summary(answer)}[/dim]")
    return answer


async def _streamed(client: ChatClient, model: str, *, as_json: bool) -> Answer:
    answer = Answer()
    if not as_json:
        out.print(f"\n[bold]2. A chat, streamed[/bold]\n\n  [cyan]you[/cyan]    {STORY}")
        out.print("  [green]model[/green]  ", end="")
    asked = [{"role": "user", "content": STORY}]
    async for piece in client.stream_chat(answer, model, asked, max_tokens=_ANSWER_TOKENS, temperature=0):
        if not as_json:
            out.print(piece.replace("\n", " "), end="", markup=False)
    if not as_json:
        out.print(f"\n         [dim]first token after {answer.first_s * 1000:.0f} ms, {_summary(answer)}[/dim]")
    return answer


async def _together(client: ChatClient, model: str, prompts: list[Prompt], *, as_json: bool) -> list[Answer]:
    """Ask everything at once; the queue decides what runs when."""
    if not as_json:
        out.print(f"\n[bold]3. {len(prompts)} programming prompts at once[/bold]\n")
    columns = (TextColumn("  answered"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=err, transient=True, disable=as_json or not err.is_terminal) as bar:
        task = bar.add_task("", total=len(prompts))

        async def ask(prompt: Prompt) -> Answer:
            asked = [{"role": "user", "content": prompt.text}]
            answer = await client.chat(model, asked, max_tokens=_ANSWER_TOKENS, temperature=0)
            bar.advance(task)
            return answer

        async with asyncio.TaskGroup() as group:
            asking = [group.create_task(ask(prompt)) for prompt in prompts]
    return [one.result() for one in asking]


def _print_summary(prompts: list[Prompt], answers: list[Answer], took_s: float) -> None:
    table = Table(box=None, pad_edge=True, header_style="bold", expand=True)
    table.add_column("PROMPT", no_wrap=True)
    table.add_column("SECONDS", justify="right", no_wrap=True)
    table.add_column("TOKENS", justify="right", no_wrap=True)
    table.add_column("ANSWER", no_wrap=True, overflow="ellipsis", ratio=1)
    tokens = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        made = int(answer.usage.get("completion_tokens", 0))
        tokens += made
        table.add_row(prompt.name, f"{answer.total_s:.2f}", str(made), escape(_one_line(answer.text)))
    out.print(table, soft_wrap=False)
    times = sorted(answer.total_s for answer in answers)
    middle = times[len(times) // 2] if times else 0.0
    out.print(
        f"\n  {len(answers)} answers, none lost, in {took_s:.1f} s: {tokens} tokens, {tokens / max(took_s, 1e-9):.0f} "
        f"tokens/s; half of them within {middle:.1f} s.\n"
    )


def _instruction(line: dict[str, str]) -> str:
    return f"Complete this Python function.\n\n{line['prompt']}" if "task_id" in line else line["prompt"]


def _summary(answer: Answer) -> str:
    tokens = int(answer.usage.get("completion_tokens", 0))
    return f"{tokens} tokens in {answer.total_s:.2f} s"


def _one_line(text: str) -> str:
    return " ".join(text.split())
