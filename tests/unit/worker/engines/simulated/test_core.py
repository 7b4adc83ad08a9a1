"""The pure parts of the simulated engine: tokens, prefix cache, schedule, failures, answers."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engines.simulated import FailureKind, SimulationSettings, chat_prompt, prompt_digest
from worker.engines.simulated.api.answers import WORDS, answer, embedding
from worker.engines.simulated.api.requests import RefusedRequest, parse_chat, parse_completion
from worker.engines.simulated.failures import Failure, drawn_failure, parse_order, parse_rates
from worker.engines.simulated.prefix_cache import PrefixCache
from worker.engines.simulated.schedule import Pace, Prefill, Slots
from worker.engines.simulated.tokens import VOCABULARY, count_tokens, decode_tokens, encode_tokens, split_tokens

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT)
def test_token_ids_turn_back_into_their_text(text: str) -> None:
    """Every text survives the way into ids and back, and counting agrees with both."""
    ids = encode_tokens(text)
    assert decode_tokens(ids) == text
    assert len(ids) == count_tokens(text) == len(split_tokens(text))
    assert all(0 <= token < VOCABULARY for token in ids)


@pytest.mark.parametrize("token", [-1, VOCABULARY, 1 << 29, (1 << 30) + 0xD800])
def test_a_number_that_is_no_token_is_refused(token: int) -> None:
    """Ids that no text has, surrogates included, raise instead of giving some text."""
    with pytest.raises(ValueError, match="not a token id"):
        decode_tokens([token])


def test_the_prefix_cache_holds_full_blocks_of_a_prompt_seen_before() -> None:
    """A repeated prompt is held in full blocks, one token short at least; a different beginning is not held at all."""
    cache = PrefixCache(capacity=8, block_tokens=2)
    prompt = "abcdefgh" * 2
    assert cache.admit("sim", prompt, 4) == 0
    assert cache.admit("sim", prompt, 4) == 2
    assert cache.admit("sim", prompt + "more", 5) == 4
    assert cache.admit("sim", "X" + prompt, 5) == 0
    assert cache.admit("lora", prompt, 4) == 0
    assert (cache.queried_tokens, cache.hit_tokens) == (22, 6)


def test_the_prefix_cache_drops_what_was_used_least_recently() -> None:
    """Over capacity, the block that nobody asked for longest goes first."""
    cache = PrefixCache(capacity=2, block_tokens=1)
    for prompt in ("aaaa", "bbbb", "aaaa", "cccc"):
        cache.admit("", prompt, 1)
    assert cache.admit("", "aaaa" + "dddd", 2) == 1


def test_a_prefix_cache_without_capacity_holds_and_counts_nothing() -> None:
    """Capacity 0 switches the cache off."""
    cache = PrefixCache(capacity=0, block_tokens=1)
    assert [cache.admit("", "aaaabbbb", 2) for _ in range(2)] == [0, 0]
    assert cache.queried_tokens == 0


def test_slots_serve_waiting_requests_in_the_order_they_came() -> None:
    """A request that finds no slot runs when one frees, first come first served."""
    slots = Slots(1)
    assert [slots.arrive(number) for number in (1, 2, 3)] == [True, False, False]
    assert (slots.running, slots.waiting) == (1, 2)
    assert [slots.leave(1), slots.leave(2), slots.leave(3)] == [[2], [3], []]
    assert (slots.running, slots.waiting) == (0, 0)


def test_a_waiting_request_that_gives_up_takes_no_slot() -> None:
    """Giving up while waiting frees nobody's slot, and the next in line is served instead."""
    slots = Slots(1)
    for number in (1, 2, 3):
        slots.arrive(number)
    assert slots.leave(2) == []
    assert slots.running == 1
    assert slots.leave(1) == [3]


def test_a_prompt_that_finds_no_room_in_the_kv_cache_waits() -> None:
    """And those behind it, until enough is free; then all that fit run."""
    slots = Slots(10, kv_blocks=4, block_tokens=16)
    assert [slots.arrive(number, tokens) for number, tokens in ((1, 33), (2, 17), (3, 1))] == [True, False, False]
    assert (slots.running, slots.waiting, slots.kv_usage) == (1, 2, 0.75)
    assert slots.leave(1) == [2, 3]
    assert slots.kv_usage == 0.75


def test_the_request_that_started_last_is_preempted_for_one_that_grows() -> None:
    """It waits ahead of the others, and runs again when a request ends."""
    slots = Slots(10, kv_blocks=4, block_tokens=1)
    assert [slots.arrive(number, 1) for number in (1, 2, 3, 4, 5)] == [True, True, True, True, False]
    assert slots.grow(1, 2) == [4]
    assert slots.grow(3, 2) == [3]
    assert (slots.preemptions, slots.runs(3), slots.running, slots.waiting) == (2, False, 2, 3)
    assert not slots.arrive(6, 1), "nobody overtakes those that wait"
    assert slots.leave(1) == [3, 4, 5]
    assert slots.kv_usage == 1.0


def test_a_request_that_is_alone_is_never_preempted() -> None:
    """Whatever it needs, it gets at most the whole cache."""
    slots = Slots(10, kv_blocks=4, block_tokens=1)
    assert slots.arrive(1, 100)
    assert slots.grow(1, 1_000) == []
    assert (slots.kv_usage, slots.leave(1), slots.kv_usage) == (1.0, [], 0.0)


def test_a_preempted_stream_goes_on_where_it_stopped() -> None:
    """Its next token comes when all it had is computed again."""
    pace = Pace(ttft_s=1.0, prefill_s_per_token=0.5, token_interval_s=2.0, lockstep=False)
    first_at = pace.resumed_at(100.0, tokens=10, done=3)
    assert pace.token_at(first_at, 3) == 106.0


def test_cached_prompt_tokens_bring_the_first_token_forward() -> None:
    """Only prompt tokens that the cache does not hold cost time."""
    pace = Pace(ttft_s=1.0, prefill_s_per_token=0.5, token_interval_s=0.0, lockstep=False)
    assert pace.first_token_at(10.0, prompt_tokens=4, cached_tokens=0) == 13.0
    assert pace.first_token_at(10.0, prompt_tokens=4, cached_tokens=4) == 11.0


@given(
    st.floats(0, 1e6),
    st.integers(1, 50),
    st.booleans(),
    st.floats(0.001, 1),
)
def test_a_token_is_due_at_its_own_time_and_not_before(first_at: float, total: int, lockstep: bool, gap: float) -> None:
    """``tokens_due`` and ``token_at`` agree for every token of every stream."""
    pace = Pace(0.0, 0.0, gap, lockstep)
    assert pace.tokens_due(first_at, first_at - 1e-6, total) == 0
    times = [pace.token_at(first_at, index) for index in range(total)]
    assert times == sorted(times)
    for index, at in enumerate(times):
        assert pace.tokens_due(first_at, at, total) >= index + 1
        if index and at - first_at > 1e-5:
            assert pace.tokens_due(first_at, at - 1e-5, total) <= index


def test_streams_in_lockstep_get_their_tokens_at_the_same_times() -> None:
    """Two streams that began at different moments share the engine's steps."""
    pace = Pace(0.0, 0.0, 0.25, lockstep=True)
    assert (
        [pace.token_at(1.1, 1), pace.token_at(1.1, 2)] == [pace.token_at(1.2, 1), pace.token_at(1.2, 2)] == [1.25, 1.5]
    )


@pytest.mark.parametrize(
    ("order", "failure"),
    [
        ({"fail": "crash"}, Failure(FailureKind.CRASH)),
        ({"fail": 429}, Failure(FailureKind.ERROR, status=429)),
        ({"fail": "503", "on": "a", "times": 2}, Failure(FailureKind.ERROR, status=503, times=2, on="a")),
        ({"fail": "close_midstream", "after_tokens": 3}, Failure(FailureKind.CLOSE_MIDSTREAM, after_tokens=3)),
        ({}, None),
    ],
)
def test_failure_orders_are_read(order: dict[str, object], failure: Failure | None) -> None:
    """A request's ``sim`` field says what fails, when, how often and where."""
    assert parse_order(order) == failure


@pytest.mark.parametrize(
    "order", [[], {"fail": "explode"}, {"fail": 200}, {"fail": "hang", "after_tokens": -1}, {"fial": "hang"}]
)
def test_a_failure_order_nobody_understands_is_refused(order: object) -> None:
    """A typing error in a test's order is an error, not a request that quietly succeeds."""
    with pytest.raises(ValueError):
        parse_order(order)


def test_drawn_failures_keep_their_share_and_repeat_with_their_seed() -> None:
    """The rate holds over many requests, and the same seed draws the same requests."""
    rates = parse_rates("500=0.2,slow=0.1")
    drawn = [drawn_failure(rates, 7, number) for number in range(2000)]
    assert drawn == [drawn_failure(rates, 7, number) for number in range(2000)]
    kinds = [failure.kind for failure in drawn if failure]
    assert 300 < kinds.count(FailureKind.ERROR) < 500
    assert 130 < kinds.count(FailureKind.SLOW) < 270


def test_settings_that_make_no_sense_are_refused() -> None:
    """No model, no slot, a negative time or more failures than requests is an error at once."""
    for wrong in (
        {"models": ()},
        {"max_num_seqs": 0},
        {"ttft_ms": -1.0},
        {"failure_rates": {FailureKind.HANG: 0.7, FailureKind.CRASH: 0.7}},
    ):
        with pytest.raises(ValueError):
            SimulationSettings(**wrong)  # type: ignore[arg-type]


def _chat(**fields: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()


def _text(settings: SimulationSettings | None = None, **fields: object) -> str:
    settings = settings or SimulationSettings()
    return answer(parse_chat(_chat(**fields), settings), settings)[0].text


def test_the_same_request_gets_the_same_text_and_another_gets_another() -> None:
    """Text is a function of seed, model and request; the engine's seed, the request's seed and the prompt change it."""
    assert _text() == _text(temperature=0.9)
    texts = {
        _text(),
        _text(seed=1),
        _text(SimulationSettings(seed=1)),
        _text(messages=[{"role": "user", "content": "ho"}]),
    }
    assert len(texts) == 4


def test_a_text_answer_begins_with_the_digest_of_its_prompt() -> None:
    """Whoever asked can prove that the answer is to its own prompt."""
    assert _text().startswith(prompt_digest(chat_prompt([("user", "hi")])))


def test_a_smaller_limit_gives_a_prefix_of_the_same_text() -> None:
    """``max_tokens`` cuts the answer and says so; with ``ignore_eos`` the answer fills it."""
    settings = SimulationSettings()
    whole = answer(parse_chat(_chat(), settings), settings)[0]
    cut = answer(parse_chat(_chat(max_completion_tokens=5), settings), settings)[0]
    filled = answer(parse_chat(_chat(max_tokens=100, ignore_eos=True), settings), settings)[0]
    assert (whole.finish, cut.finish, filled.finish) == ("stop", "length", "length")
    assert (len(cut.pieces), len(filled.pieces)) == (5, 100)
    assert whole.text.startswith(cut.text)
    assert filled.text.startswith(whole.text)


def test_a_stop_string_ends_the_answer() -> None:
    """The first stop string found ends the text before itself, or after if it is to be kept."""
    word = next(word for word in _text().split(" ")[1:])
    stopped, kept = _text(stop=[word, "nowhere"]), _text(stop=word, include_stop_str_in_output=True)
    assert word not in stopped
    assert kept == stopped + word


def test_every_choice_has_a_text_of_its_own() -> None:
    """``n`` choices differ from each other, and the first is what a single choice would be."""
    settings = SimulationSettings()
    choices = answer(parse_chat(_chat(n=3), settings), settings)
    assert len({choice.text for choice in choices}) == 3
    assert choices[0].text == _text()


def test_echo_mode_answers_the_last_user_message() -> None:
    """An echo is the whole message, whatever its alphabet."""
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": [{"type": "text", "text": "Grüße, 世界 🌍!"}]},
    ]
    assert _text(SimulationSettings(mode="echo"), messages=messages) == "Grüße, 世界 🌍!"


def test_a_completion_takes_token_ids_and_may_repeat_its_prompt() -> None:
    """Ids and their text are the same prompt; ``echo`` puts it before the answer."""
    settings = SimulationSettings()

    def text(prompt: object, **fields: object) -> str:
        body = json.dumps({"prompt": prompt, **fields}).encode()
        return answer(parse_completion(body, settings), settings)[0].text

    assert text("say it") == text(encode_tokens("say it")) == text(["say it"])
    assert text("say it", echo=True) == "say it" + text("say it")


def test_an_embedding_is_a_unit_vector_and_fewer_dimensions_its_prefix() -> None:
    """Vectors have length 1, are the same each time, and shorten as Matryoshka embeddings do."""
    vector, short = embedding("text", "sim", 0, 384), embedding("text", "sim", 0, 64)
    assert math.isclose(sum(x * x for x in vector), 1.0)
    assert math.isclose(sum(x * x for x in short), 1.0)
    assert vector == embedding("text", "sim", 0, 384) != embedding("other", "sim", 0, 384)
    assert math.isclose(short[0] / short[1], vector[0] / vector[1])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"model": 5}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10_000_000}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"sim": {"fail": "explode"}}, "sim"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused_by_name(fields: dict[str, object], param: str) -> None:
    """Each wrong value is a 400 that names the parameter, as vLLM's."""
    with pytest.raises(RefusedRequest) as refused:
        parse_chat(_chat(**fields), SimulationSettings())
    assert (refused.value.status, refused.value.param, refused.value.kind) == (400, param, "BadRequestError")


def test_a_byte_picks_one_of_the_words_and_each_is_one_token() -> None:
    """The vocabulary has a word for every byte, and a word costs one token."""
    assert len(set(WORDS)) == 256
    assert {count_tokens(word) for word in WORDS} == {1}


@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": None}, {"type": "text", "text": 1}])
def test_a_text_part_without_its_text_is_refused(part: dict[str, object]) -> None:
    """[H4] As an engine does it, with 400: an error of another kind would count as a failed attempt."""
    body = _chat(messages=[{"role": "user", "content": [part]}])
    with pytest.raises(RefusedRequest, match="content should be"):
        parse_chat(body, SimulationSettings())


def test_prompts_are_computed_one_after_another_where_asked() -> None:
    """A second one waits for what is left of the first, without what is cached of either; its other costs are its
    own."""
    serial, parallel = (Pace(1.0, 0.5, 2.0, lockstep=False, serial_prefill=serial) for serial in (True, False))
    for pace, second_at in ((serial, 13.0), (parallel, 8.0)):
        prefill = Prefill()
        assert prefill.first_token_at(pace, 5.0, 20, 8) == 12.0
        assert prefill.first_token_at(pace, 6.0, 2, 0) == second_at
        assert prefill.first_token_at(pace, 40.0, 2, 0) == 42.0
