"""Several attempts are merged into one answer."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from queue_schemas import CONTINUED, END, HEAD, Frame, JobId, Marker, MarkerKind, StreamBroken
from router.inference.merging.attempt_merger import AttemptMerger

JOB = JobId("0-" + "a" * 32)
SSE = "text/event-stream; charset=utf-8"


def chunk(text: str | None, *, ident: str = "one", finish: str | None = None, **more: Any) -> bytes:
    delta: dict[str, Any] = {} if text is None else {"content": text}
    delta |= more.pop("delta", {})
    choice = {"index": more.pop("index", 0), "delta": delta, "finish_reason": finish, "logprobs": None}
    choice |= more.pop("choice", {})
    body = {"id": ident, "object": "chat.completion.chunk", "created": len(ident), "model": "m", "choices": [choice]}
    return b"data: " + orjson.dumps(body | more) + b"\n\n"


def role(ident: str = "one") -> bytes:
    return chunk("", ident=ident, delta={"role": "assistant"})


def usage(ident: str = "one") -> bytes:
    body = {"id": ident, "object": "chat.completion.chunk", "created": len(ident), "choices": [], "usage": {"total": 9}}
    return b"data: " + orjson.dumps(body) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def attempt(pieces: list[bytes], *, epoch: int = 1, name: str = "a", status: int = 200, kind: str = SSE) -> list[Frame]:
    last = len(pieces) - 1
    return [
        Frame(
            JOB, epoch, name, seq, (HEAD if seq == 0 else 0) | (END if seq == last else 0), data,
            status if seq == 0 else 0, kind if seq == 0 else "",
        )
        for seq, data in enumerate(pieces)
    ]  # fmt: skip


def requeued(epoch: int) -> Marker:
    return Marker(MarkerKind.REQUEUED, JOB, epoch, "its worker was lost")


def stream(limit: int = 1 << 20) -> AttemptMerger:
    return AttemptMerger(stream=True, replay_limit_bytes=limit)


def feed(merger: AttemptMerger, news: list[Frame | Marker]) -> bytes:
    got = b""
    for item in news:
        if isinstance(item, Frame):
            merger.on_frame(item)
        else:
            merger.on_marker(item)
        got += merger.take()
    return got


def events(data: bytes) -> list[Any]:
    found = [event.removeprefix(b"data: ") for event in data.split(b"\n\n") if event]
    return [event.decode() if event == b"[DONE]" else orjson.loads(event) for event in found]


def text_of(data: bytes) -> str:
    return "".join(
        choice["delta"].get("content") or "" for e in events(data) if e != "[DONE]" for choice in e["choices"]
    )


def test_a_stream_of_one_attempt_passes_byte_for_byte() -> None:
    """Without a loss the client gets the engine's own bytes."""
    pieces = [role(), chunk("Hello"), chunk(" you", finish="stop"), usage(), DONE]
    merger = stream()
    assert feed(merger, [*attempt(pieces)]) == b"".join(pieces)
    assert merger.ended
    assert merger.settled
    assert merger.head is not None
    assert merger.head.status == 200


def test_repeats_and_frames_of_older_epochs_are_dropped() -> None:
    """A frame counts once, and nothing of a lost attempt counts after its epoch ended."""
    merger = stream()
    first = attempt([role("x"), chunk("no")], epoch=1, name="old")
    second = attempt([role(), chunk("yes"), DONE], epoch=2, name="new")
    got = feed(merger, [requeued(2), *first, second[0], second[0], first[1], second[1], second[1], *second])
    assert got == role() + chunk("yes") + DONE


def test_late_markers_of_older_epochs_are_dropped() -> None:
    """A marker about an attempt that is over does not affect the one that runs."""
    merger = stream()
    pieces = [role(), chunk("Hi"), DONE]
    frames = attempt(pieces, epoch=3)
    late = [requeued(2), Marker(MarkerKind.EXPIRED, JOB, 2, "late")]
    assert feed(merger, [frames[0], *late, *frames[1:]]) == b"".join(pieces)
    assert merger.ended


def test_a_frame_of_another_attempt_of_the_same_epoch_is_dropped() -> None:
    """Only the attempt that began an epoch counts in it."""
    merger = stream()
    mine, other = attempt([role(), DONE], name="mine"), attempt([chunk("x"), DONE], name="other")
    assert feed(merger, [mine[0], *other, mine[1]]) == role() + DONE


def test_a_skipped_frame_is_a_gap_until_the_job_runs_again() -> None:
    """A missing frame is never skipped: the job has to run again, and then the stream continues."""
    merger = stream()
    pieces = [role(), chunk("Hel"), chunk("lo"), DONE]
    frames = attempt(pieces)
    got = feed(merger, [frames[0], frames[1], frames[3]])
    assert merger.gap
    assert not merger.closed
    merger.restart()
    got += feed(merger, [*attempt([role("two"), chunk("Hello", ident="two"), DONE], name="again")])
    assert text_of(got) == "Hello"
    assert got.endswith(DONE)
    assert merger.ended


def test_an_attempt_whose_first_frame_is_missing_is_a_gap() -> None:
    """An attempt is taken from its beginning or not at all."""
    merger = stream()
    feed(merger, [attempt([role(), DONE])[1]])
    assert merger.gap


def test_a_plain_answer_is_released_when_it_is_complete() -> None:
    """Nothing of a plain answer is released before its end, so its length is known and a loss leaves no trace."""
    merger = AttemptMerger(stream=False, replay_limit_bytes=0)
    lost = attempt([b'{"a"', b":1}"], kind="application/json", name="lost")
    whole = attempt([b'{"b"', b":2}"], kind="application/json", name="new", epoch=2, status=201)
    assert feed(merger, [lost[0], requeued(2), whole[0]]) == b""
    assert merger.head is None
    assert feed(merger, [whole[1]]) == b'{"b":2}'
    assert merger.head is not None
    assert (merger.head.status, merger.head.content_type) == (201, "application/json")


def test_an_error_answer_to_a_stream_request_is_plain() -> None:
    """An engine that refuses a stream request answers as it would without a stream."""
    merger = stream()
    frames = attempt([b'{"error"', b": {}}"], status=400, kind="application/json")
    assert feed(merger, [frames[0]]) == b""
    assert feed(merger, [frames[1]]) == b'{"error": {}}'
    assert merger.head is not None
    assert merger.head.status == 400


def test_a_lost_attempt_that_delivered_nothing_leaves_no_trace() -> None:
    """A job that was lost before its first token simply runs again."""
    pieces = [role(), chunk("Hi"), DONE]
    merger = stream()
    assert feed(merger, [requeued(2), *attempt(pieces, epoch=2)]) == b"".join(pieces)


def test_a_restarted_stream_continues_where_it_stopped() -> None:
    """Delivered text is dropped, ids stay the first attempt's, the role chunk and the finish come once."""
    merger = stream()
    lost = attempt([role(), chunk("The capital"), chunk(" of"), chunk("never seen")])
    again = attempt(
        [
            role("two2"), chunk("The", ident="two2"), chunk(" capital of France", ident="two2"),
            chunk(" is Paris.", ident="two2", finish="stop"), usage("two2"), DONE,
        ],
        epoch=2, name="b",
    )  # fmt: skip
    got = feed(merger, [*lost[:3], requeued(2), *again])
    assert text_of(got) == "The capital of France is Paris."
    seen = events(got)
    assert {(e["id"], e["created"]) for e in seen[:-1]} == {("one", 3)}
    assert sum("role" in c["delta"] for e in seen[:-1] for c in e["choices"]) == 1
    assert [c["finish_reason"] for e in seen[:-1] for c in e["choices"] if c["finish_reason"]] == ["stop"]
    assert sum(bool(e.get("usage")) for e in seen[:-1]) == 1
    assert seen[-1] == "[DONE]"
    assert merger.ended


def test_half_an_event_of_a_lost_attempt_is_never_delivered() -> None:
    """Only whole events reach the client, wherever the engine's bytes were cut."""
    merger = stream()
    event = chunk("Hello")
    lost = attempt([role() + event[:20], event[20:], DONE])
    got = feed(merger, [lost[0]])
    assert got == role()
    got += feed(merger, [requeued(2), *attempt([role("b") + chunk("Hi", ident="b"), DONE], epoch=2, name="b")])
    assert text_of(got) == "Hi"


def test_a_restart_with_another_text_breaks_the_stream_with_an_error() -> None:
    """Text that differs is never spliced: the client gets an error."""
    merger = stream()
    lost = attempt([role(), chunk("Paris"), DONE])
    again = attempt([role("b"), chunk("Lyon", ident="b"), DONE], epoch=2, name="b")
    got = feed(merger, [*lost[:2], requeued(2), *again])
    assert text_of(got) == "Paris"
    assert merger.error is not None
    assert merger.error.code == "stream_broken"
    assert not merger.settled


@pytest.mark.parametrize(
    "again",
    [
        [chunk("Par", ident="b"), chunk(None, ident="b", finish="stop"), DONE],
        [chunk("Par", ident="b"), DONE],
        [chunk("Par", ident="b")],
    ],
    ids=["finish", "done", "end"],
)
def test_a_restart_that_ends_earlier_breaks_the_stream(again: list[bytes]) -> None:
    """A shorter answer than what was delivered is another answer."""
    merger = stream()
    lost = attempt([role(), chunk("Paris"), DONE])[:2]
    got = feed(merger, [*lost, requeued(2), *attempt(again, epoch=2, name="b")])
    assert got == role() + chunk("Paris")
    assert merger.error is not None
    assert merger.error.code == "stream_broken"


@pytest.mark.parametrize(
    "strange",
    [
        chunk(None, delta={"tool_calls": [{"index": 0}]}),
        chunk("a", choice={"logprobs": {"content": []}}),
        chunk("a", choice={"token_ids": [1]}),
        b'event: x\ndata: {"type": "response.created"}\n\n',
    ],
    ids=["tool calls", "log probabilities", "token ids", "another protocol"],
)
def test_a_stream_that_cannot_be_compared_breaks(strange: bytes) -> None:
    """Only plain text is restarted; anything else ends with an error as soon as its attempt is lost."""
    merger = stream()
    feed(merger, [*attempt([role(), strange, DONE])[:2], requeued(2)])
    assert merger.error is not None
    assert merger.error.code == "stream_broken"


def test_a_stream_above_the_replay_limit_cannot_be_restarted() -> None:
    """The memory for a restart is bounded; past it a loss is an error."""
    merger = stream(limit=300)
    feed(merger, [*attempt([role(), chunk("x" * 301), DONE])[:2], requeued(2)])
    assert merger.error is not None
    assert merger.error.code == "stream_broken"


def test_a_client_that_has_everything_needs_no_second_attempt() -> None:
    """An attempt that is lost after its [DONE] was delivered leaves a complete answer."""
    merger = stream()
    feed(merger, [*attempt([role(), chunk("Hi", finish="stop"), DONE, b""])[:3], requeued(2)])
    assert merger.ended
    assert not merger.settled


def test_reasoning_and_choices_are_compared_separately() -> None:
    """Each choice and each channel of text has its own position."""
    pieces = [
        role(), chunk(None, delta={"reasoning_content": "hm"}), chunk("A", index=0), chunk("B", index=1),
        chunk("a", index=0), chunk("b", index=1, finish="stop"), chunk(None, index=0, finish="length"), DONE,
    ]  # fmt: skip
    merger = stream()
    got = feed(merger, [*attempt(pieces)[:4], requeued(2), *attempt(pieces, epoch=2, name="b")])
    assert events(got) == events(b"".join(pieces))


def test_an_answer_does_not_begin_before_its_reasoning_caught_up() -> None:
    """Text of one channel waits for what was delivered on the others."""
    lost = [role(), chunk(None, delta={"reasoning_content": "hmm"}), DONE]
    again = [chunk(None, ident="b", delta={"reasoning_content": "h"}), chunk("Yes", ident="b"), DONE]
    merger = stream()
    got = feed(merger, [*attempt(lost)[:2], requeued(2), *attempt(again, epoch=2, name="b")])
    assert text_of(got) == ""
    assert merger.error is not None


def test_markers_end_a_job_with_their_error() -> None:
    """Dead, cancelled and expired jobs answer with a code of their own, and nothing is left in the queue."""
    codes = {}
    for kind in (MarkerKind.DEAD, MarkerKind.CANCELLED, MarkerKind.EXPIRED):
        merger = stream()
        merger.on_marker(Marker(kind, JOB, 1, "because"))
        assert merger.error is not None
        assert merger.settled
        codes[kind] = merger.error.code
    assert list(codes.values()) == ["attempts_exhausted", "cancelled", "deadline_exceeded"]


def test_a_stream_without_events_passes_but_cannot_restart() -> None:
    """A streamed answer of another kind, such as audio, passes as it comes."""
    merger = stream()
    frames = attempt([b"RIFF", b"data", b"!"], kind="audio/wav")
    assert feed(merger, [frames[0], frames[1]]) == b"RIFFdata"
    feed(merger, [requeued(2)])
    assert merger.error is not None


def test_an_unfinished_last_event_passes_at_the_end() -> None:
    """What the engine sent is what the client gets, even without the last blank line."""
    merger = stream()
    assert feed(merger, [*attempt([role(), b"data: [DONE]"])]) == role() + b"data: [DONE]"


def _cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def _answer(words: list[str], splits: list[bool], ident: str) -> bytes:
    """A chat stream of ``words``, neighbours joined into one chunk where ``splits`` says no."""
    texts: list[str] = []
    for word, split in zip(words, splits, strict=True):
        if split or not texts:
            texts.append(word)
        else:
            texts[-1] += word
    body = b"".join(chunk(text, ident=ident) for text in texts)
    return role(ident) + body + chunk(None, ident=ident, finish="stop") + usage(ident) + DONE


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_interleaving_of_attempts_makes_a_gap_or_a_repeat(data: st.DataObject) -> None:
    """However often attempts are lost, repeated, cut or overtaken by late frames, the client reads the one text."""
    words = data.draw(st.lists(st.text("abé \n", min_size=1, max_size=4), min_size=1, max_size=8))
    news: list[Frame | Marker] = []
    leftovers: list[Frame] = []
    attempts = data.draw(st.integers(1, 4))
    for epoch in range(1, attempts + 1):
        splits = data.draw(st.lists(st.booleans(), min_size=len(words), max_size=len(words)))
        body = _answer(words, splits, f"id{epoch}")
        frames = attempt(
            _cut(body, data.draw(st.lists(st.integers(0, 4000), max_size=6))), epoch=epoch, name=f"n{epoch}"
        )
        last = epoch == attempts
        shown = frames if last else frames[: data.draw(st.integers(0, len(frames) - 1))]
        for frame in shown:
            news += [frame] * data.draw(st.integers(1, 2))
            if leftovers and data.draw(st.booleans()):
                news.append(data.draw(st.sampled_from(leftovers)))
        leftovers += frames
        if not last and data.draw(st.booleans()):
            news.append(requeued(epoch + 1))
    merger = stream()
    got = feed(merger, news)
    assert merger.error is None
    assert merger.ended
    assert text_of(got) == "".join(words)
    seen = events(got)
    assert seen.count("[DONE]") == 1
    assert len({e["id"] for e in seen if e != "[DONE]"}) == 1


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_another_text_is_never_spliced_to_what_was_delivered(data: st.DataObject) -> None:
    """Whatever a second attempt says, the client reads a prefix of one attempt's text, or one attempt's whole text."""
    first, second = (data.draw(st.text("ab", min_size=1, max_size=6)) for _ in range(2))
    one, two = ([role(), *map(chunk, text), chunk(None, finish="stop"), DONE] for text in (first, second))
    shown = data.draw(st.integers(0, len(one) - 1))
    merger = stream()
    got = text_of(feed(merger, [*attempt(one)[:shown], requeued(2), *attempt(two, epoch=2, name="b")]))
    if merger.error is not None:
        assert first.startswith(got)
    else:
        assert got in (first, second)


def test_an_event_above_the_limit_passes_in_pieces() -> None:
    """A very long event reaches the client byte for byte; a loss after half of it ends the stream with an error."""
    long = chunk("x" * (3 << 20))
    pieces = [role(), *(long[at : at + 500_000] for at in range(0, len(long), 500_000)), chunk("end"), DONE]
    frames = attempt(pieces)
    whole, cut = stream(8 << 20), stream(8 << 20)
    assert feed(whole, [*frames]) == b"".join(pieces)
    assert whole.ended
    feed(cut, [*frames[:6]])
    assert cut.mid_event
    feed(cut, [requeued(2)])
    assert isinstance(cut.error, StreamBroken)


def test_no_comment_goes_into_a_long_event() -> None:
    """``mid_event`` says so only while an event passes in pieces."""
    long = chunk("x" * (2 << 20))
    first, second, third = attempt([role(), long[:-5], long[-5:], DONE])[:3]
    merger = stream()
    seen = []
    for frame in (first, second, third):
        feed(merger, [frame])
        seen.append(merger.mid_event)
    assert seen == [False, True, False]


# Streams that go on behind what was delivered


def lost(epoch: int) -> Marker:
    return Marker(MarkerKind.LOST, JOB, epoch, "its worker was lost")


def continued(pieces: list[bytes], *, epoch: int, name: str) -> list[Frame]:
    first, *rest = attempt(pieces, epoch=epoch, name=name)
    return [replace(first, flags=first.flags | CONTINUED), *rest]


def continuable(*, usage: bool = False, limit: int = 1 << 20) -> AttemptMerger:
    return AttemptMerger(stream=True, replay_limit_bytes=limit, on_loss="continue", usage=usage)


def test_a_continued_stream_reads_as_one() -> None:
    """The next attempt says only the rest; id, time and model stay the first one's, the role comes once."""
    merger = continuable()
    got = feed(merger, [*attempt([role(), chunk("The capital"), chunk(" of"), DONE])[:3], lost(2)])
    assert merger.lost_epoch == 2
    assert merger.continuation_prefix() == "The capital of"
    merger.on_resumed(2)
    rest = [
        role("b"),
        chunk(" France", ident="b", model="other"),
        chunk("", ident="b"),
        chunk("", ident="b", finish="stop"),
    ]
    got += feed(merger, [*continued([*rest, usage("b"), DONE], epoch=2, name="b")])
    seen = events(got)
    assert text_of(got) == "The capital of France"
    assert {(e["id"], e["created"]) for e in seen[:-1]} == {("one", 3)}
    assert {e["model"] for e in seen[:-1] if "model" in e} == {"m"}
    assert sum("role" in c["delta"] for e in seen[:-1] for c in e["choices"]) == 1
    assert [c["finish_reason"] for e in seen[:-1] for c in e["choices"] if c["finish_reason"]] == ["stop"]
    assert sum(bool(e.get("usage")) for e in seen[:-1]) == 1
    assert (merger.ended, merger.continued, merger.compared) == (True, 1, 0)


def test_an_attempt_that_begins_anew_is_compared_although_a_prefix_was_sent() -> None:
    """A worker that cannot continue does not set the flag that it does."""
    merger = continuable()
    first = [role(), chunk("Paris"), chunk(" is"), DONE]
    got = feed(merger, [*attempt(first)[:2], lost(2)])
    assert merger.continuation_prefix() == "Paris"
    got += feed(merger, [*attempt(first, epoch=2, name="b")])
    assert text_of(got) == "Paris is"
    assert (merger.continued, merger.compared) == (0, 1)


def test_a_continuation_without_a_prefix_breaks_the_stream() -> None:
    """An attempt that continues although no prefix was sent cannot fit."""
    merger = continuable()
    feed(merger, [*attempt([role(), chunk("Paris"), DONE])[:2], requeued(2)])
    feed(merger, [*continued([chunk(" is"), DONE], epoch=2, name="b")])
    assert isinstance(merger.error, StreamBroken)


def test_the_prefix_is_due_once_for_each_loss() -> None:
    """A repeated marker asks again only while no attempt has begun; a later loss asks anew."""
    merger = continuable()
    feed(merger, [*attempt([role(), chunk("a"), DONE])[:2], lost(2)])
    merger.continuation_prefix()
    merger.on_resumed(2)
    merger.on_marker(lost(2))
    assert merger.lost_epoch == 2
    merger.on_resumed(2)
    second = continued([chunk("b", ident="b"), DONE], epoch=2, name="b")
    feed(merger, [second[0], lost(2)])
    assert merger.lost_epoch == 0
    assert not merger.closed
    feed(merger, [lost(3)])
    assert (merger.lost_epoch, merger.continuation_prefix()) == (3, "ab")
    merger.on_resumed(2)
    assert merger.lost_epoch == 3


@pytest.mark.parametrize(
    "said",
    [
        [],
        [role()],
        [role(), chunk(None, delta={"reasoning_content": "hm"}), chunk("Yes")],
        [role(), chunk("A"), chunk("B", index=1)],
        [role(), chunk("Yes", finish="stop")],
    ],
    ids=["nothing", "a role", "reasoning", "two choices", "finished, its usage outstanding"],
)
def test_a_stream_that_is_not_one_text_has_no_prefix(said: list[bytes]) -> None:
    """The next attempt begins anew then, and is compared."""
    merger = continuable(usage=True)
    feed(merger, [*attempt([*said, DONE])[: len(said)], lost(2)])
    assert (merger.lost_epoch, merger.continuation_prefix()) == (2, "")


@pytest.mark.parametrize("usage_requested", [False, True])
def test_a_stream_that_lacks_only_its_end_is_completed(usage_requested: bool) -> None:
    """All text was delivered, and the usage if it was requested: no other attempt is needed for [DONE]."""
    said = [role(), chunk("Yes", finish="stop"), *([usage()] if usage_requested else [])]
    merger = continuable(usage=usage_requested)
    got = feed(merger, [*attempt([*said, DONE])[: len(said)], lost(2)])
    assert got == b"".join(said) + DONE
    assert (merger.ended, merger.settled, merger.lost_epoch) == (True, False, 0)


@pytest.mark.parametrize("name", ["", "b"], ids=["it waits", "it runs"])
def test_a_prefix_stays_valid_until_an_attempt_is_seen(name: str) -> None:
    """A job that runs again was sent a prefix, and keeps it when the queue is asked for its status."""
    merger = continuable()
    frames = attempt([role(), chunk("Once"), chunk(" upon"), DONE])
    got = feed(merger, [*frames[:2], frames[3]])
    merger.restart()
    assert merger.continuation_prefix() == "Once"
    merger.require_epoch(1, name)
    got += feed(merger, [*continued([role("two"), chunk(" upon", ident="two"), DONE], epoch=1, name="b")])
    assert text_of(got) == "Once upon"
    assert merger.error is None


def test_choices_that_have_not_begun_have_not_ended() -> None:
    """Of several prompts, one may be answered before another one begins: its stream lacks more than its end."""
    first = [chunk("A", finish="stop"), chunk("B", index=1), chunk(None, index=1, finish="stop"), DONE]
    again = [chunk("A", ident="b", finish="stop"), chunk("B", ident="b", index=1, finish="stop"), DONE]
    merger = AttemptMerger(stream=True, replay_limit_bytes=1 << 20, choices=2)
    got = feed(merger, [*attempt(first)[:1], requeued(2)])
    assert not merger.ended
    got += feed(merger, [*attempt(again, epoch=2, name="b")])
    assert text_of(got) == "AB"
    assert merger.settled


def test_a_stream_with_the_policy_fail_ends_with_an_error() -> None:
    """Only once something was delivered; before, it simply runs again."""
    merger = AttemptMerger(stream=True, replay_limit_bytes=1 << 20, on_loss="fail")
    frames = attempt([role(), chunk("Hi"), DONE], epoch=2, name="b")
    feed(merger, [requeued(2), *frames[:2], requeued(3)])
    assert isinstance(merger.error, StreamBroken)


def test_an_error_within_a_continued_attempt_reaches_the_client() -> None:
    """The engine's own error, and the end."""
    merger = continuable()
    feed(merger, [*attempt([role(), chunk("Hi"), DONE])[:2], lost(2)])
    merger.continuation_prefix()
    error = b'data: {"error": {"message": "out of memory"}}\n\n'
    assert feed(merger, [*continued([error], epoch=2, name="b")]) == error
    assert merger.ended


def test_a_continued_attempt_that_is_refused_breaks_the_stream() -> None:
    """An answer with an error status cannot follow what was delivered."""
    merger = continuable()
    feed(merger, [*attempt([role(), chunk("Hi"), DONE])[:2], lost(2)])
    merger.continuation_prefix()
    refused = attempt([b'{"error": {}}'], epoch=2, name="b", status=400, kind="application/json")
    feed(merger, [*refused])
    assert isinstance(merger.error, StreamBroken)
    assert "400" in merger.error.message


def test_long_streams_are_remembered_as_text() -> None:
    """Far more bytes of events than the limit can pass, as long as their text stays below it."""
    pieces = [role(), *(chunk(f"{n:04} ") for n in range(2_000)), DONE]
    merger = continuable(limit=20_000)
    got = feed(merger, [*attempt(pieces)[:1_500], lost(2)])
    assert len(got) > 10 * 20_000
    assert merger.continuation_prefix() == text_of(got)


def persisted(limit: int = 1 << 20) -> AttemptMerger:
    return AttemptMerger(stream=True, replay_limit_bytes=limit, on_loss="continue", persisted=True)


def test_a_persisted_stream_continues_behind_what_was_read() -> None:
    """Its Router sent no prefix: the next worker read the same frames, so its attempt follows them."""
    merger = persisted()
    got = feed(merger, [*attempt([role(), chunk("Once "), DONE])[:2], requeued(2)])
    got += feed(merger, [*continued([role("two"), chunk("upon", ident="two"), DONE], epoch=2, name="b")])
    assert text_of(got) == "Once upon"
    assert merger.ended
    assert merger.continued == 1


def test_a_continued_attempt_without_frames_before_it_is_refused() -> None:
    """Without the frames in front of it there would be a gap."""
    merger = persisted()
    feed(merger, [*continued([chunk("upon"), DONE], epoch=2, name="b")])
    assert isinstance(merger.error, StreamBroken)


@pytest.mark.parametrize("said", ["Once ", "Once upon a "])
def test_a_replaced_attempt_is_compared_until_its_text_was_repeated(said: str) -> None:
    """The client has more, or less, of the first attempt than the second said before it was lost as well; the third
    continues behind the second. Nothing is repeated."""
    merger = persisted()
    got = feed(merger, [*attempt([role(), chunk("Once upon "), DONE])[:2], requeued(2)])
    got += feed(merger, [*attempt([role(), chunk(said), DONE], epoch=2, name="b")[:2], requeued(3)])
    rest = "Once upon a time".removeprefix(said)
    got += feed(merger, [*continued([role(), chunk(rest), DONE], epoch=3, name="c")])
    assert text_of(got) == "Once upon a time"
    assert merger.ended


def test_a_replaced_attempt_that_said_something_else_breaks_the_stream() -> None:
    """Also when the difference shows only in the attempt that continues the one which replaced it."""
    merger = persisted()
    feed(merger, [*attempt([role(), chunk("Once upon "), DONE])[:2], requeued(2)])
    feed(merger, [*attempt([role(), chunk("Once "), DONE], epoch=2, name="b")[:2], requeued(3)])
    assert not merger.closed
    feed(merger, [*continued([chunk("more"), DONE], epoch=3, name="c")])
    assert isinstance(merger.error, StreamBroken)


def test_output_is_read_again_from_the_position_of_the_stream() -> None:
    """After a gap the missing frames and those that follow are all that counts."""
    merger = persisted()
    run = attempt([role(), chunk("a"), chunk("b"), chunk("c"), DONE])
    got = feed(merger, [run[0], run[1], run[3]])
    assert merger.gap
    assert merger.position == (1, 1)
    assert merger.reread(1, "a", run[1:4])
    got += feed(merger, [*run[2:], *run])
    assert got == b"".join(frame.data for frame in run)


@pytest.mark.parametrize(
    ("epoch", "name", "kept"),
    [
        (1, "a", []),
        (1, "b", []),
        (1, "", []),
        (2, "c", continued([chunk("c"), DONE], epoch=2, name="c")),
        (
            3,
            "c",
            [*attempt([role(), chunk("a"), chunk("b"), DONE], name="b")[2:], *continued([DONE], epoch=3, name="c")],
        ),
        (2, "c", attempt([role(), chunk("a"), DONE], epoch=1, name="c")),
    ],
    ids=["frames lost", "another attempt", "unclaimed again", "continued since", "another one continued", "began anew"],
)
def test_output_that_lost_frames_is_read_from_its_beginning(epoch: int, name: str, kept: list[Frame]) -> None:
    """The server lost its latest writes: what the client has is compared with what is said now."""
    merger = persisted()
    run = attempt([role(), chunk("a"), chunk("b"), chunk("c"), DONE])
    got = feed(merger, run[:3])
    assert not merger.reread(epoch, name, kept)
    assert merger.position == (0, 0)
    got += feed(merger, run[:2])
    got += feed(merger, [requeued(2), *continued([chunk("b"), chunk("c"), DONE], epoch=2, name="c")])
    assert text_of(got) == "abc"
    assert merger.ended


def test_an_answer_that_began_anew_is_read_from_there() -> None:
    """What the client has was replaced: it is compared, without another read."""
    merger = persisted()
    got = feed(merger, [*attempt([role(), chunk("a"), chunk("b"), DONE])[:3], requeued(2)])
    assert merger.position == (1, 2)
    anew = attempt([role(), chunk("ab"), chunk("c"), DONE], epoch=2, name="b")
    assert merger.reread(2, "b", anew)
    got += feed(merger, anew)
    assert text_of(got) == "abc"


def test_frames_that_a_marker_overtook_are_not_skipped() -> None:
    """They are persisted before the attempt that the marker names."""
    merger = persisted()
    run = attempt([role(), chunk("a"), chunk("b"), DONE])
    got = feed(merger, [*run[:2], requeued(2)])
    kept = [*run[:3], *continued([chunk("c"), DONE], epoch=2, name="b")]
    assert not merger.reread(2, "b", kept[1:])
    assert merger.reread(2, "b", kept)
    got += feed(merger, kept)
    assert text_of(got) == "abc"


def test_late_frames_from_before_a_loss_are_dropped() -> None:
    """A late frame of an attempt that the queue forgot is not taken for the one that runs."""
    merger = persisted()
    assert feed(merger, [attempt([role(), chunk("x"), DONE], epoch=4, name="old")[1]]) == b""
    assert merger.gap
    run = attempt([role(), chunk("y"), DONE], name="new")
    assert not merger.reread(1, "new", run)
    assert merger.reread(1, "new", run)
    assert feed(merger, run) == b"".join(frame.data for frame in run)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_mix_of_losses_makes_a_gap_or_a_repeat(data: st.DataObject) -> None:
    """Attempts that continue or begin anew, lost at any point, with late frames in between: one text, one end."""
    words = data.draw(st.lists(st.text("abé \n", min_size=1, max_size=4), min_size=1, max_size=8))
    whole = "".join(words)
    merger = continuable(usage=True)
    got = b""
    offered = ""
    leftovers: list[Frame] = []
    attempts = data.draw(st.integers(1, 5))
    for epoch in range(1, attempts + 1):
        goes_on = bool(offered) and data.draw(st.booleans())
        rest = [whole[len(offered) :]] if goes_on else words
        splits = data.draw(st.lists(st.booleans(), min_size=len(rest), max_size=len(rest)))
        body = _answer(rest, splits, f"id{epoch}")
        cut = _cut(body, data.draw(st.lists(st.integers(0, 4000), max_size=6)))
        frames = (continued if goes_on else attempt)(cut, epoch=epoch, name=f"n{epoch}")
        last = epoch == attempts
        for frame in frames if last else frames[: data.draw(st.integers(0, len(frames) - 1))]:
            got += feed(merger, [frame] * data.draw(st.integers(1, 2)))
            if leftovers and data.draw(st.booleans()):
                got += feed(merger, [data.draw(st.sampled_from(leftovers))])
        leftovers += frames
        if not last:
            got += feed(merger, [lost(epoch + 1)] * data.draw(st.integers(1, 2)))
            if merger.closed:
                break
            offered = merger.continuation_prefix()
            merger.on_resumed(epoch + 1)
    assert merger.error is None
    assert merger.ended
    assert text_of(got) == whole
    seen = events(got)
    assert seen.count("[DONE]") == 1
    assert len({e["id"] for e in seen if e != "[DONE]"}) == 1
    assert sum(bool(c["finish_reason"]) for e in seen if e != "[DONE]" for c in e["choices"]) == 1
    assert sum(bool(e.get("usage")) for e in seen if e != "[DONE]") == 1
