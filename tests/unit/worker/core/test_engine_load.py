"""An engine's load from its metrics page."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.slots import EngineLoad
from worker.core import read_load
from worker.core.metric_samples import MAX_REQUESTS

PAGE = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="org/m{}el"} 12.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="org/m{}el"} 5.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="org/m{}el",reason="capacity"} 3.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="org/m{}el",reason="deferred"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="org/m{}el"} 0.4567
vllm:prefix_cache_queries_total{engine="0",model_name="org/m{}el"} 5.052943e+06
vllm:prefix_cache_queries_created{engine="0",model_name="org/m{}el"} 1.7e+09
vllm:prefix_cache_hits_total{engine="0",model_name="org/m{}el"} 120000.0
vllm:num_preemptions_total{engine="0",model_name="org/m{}el"} 1.0
vllm:external_prefix_cache_queries_total{engine="0",model_name="org/m{}el"} 0.0
vllm:generation_tokens_total{engine="0",model_name="org/m{}el"} 777.0
vllm:cache_config_info{block_size="16",cache_dtype="auto",enable_prefix_caching="True",engine="0",num_gpu_blocks="1000",\
num_gpu_blocks_override="None",user_specified_block_size="False"} 1.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5",model_name="org/m{}el"} 3.0
""".replace(b"\\\n", b"")


def test_vllms_page_is_read() -> None:
    """Requests that wait for something else than room are not counted as waiting."""
    assert read_load(PAGE) == EngineLoad(3, 12, 0.4567, 1, 5_052_943, 120_000, 777, 16_000)


def test_older_names_are_read() -> None:
    """Of vLLM before 0.11, also without labels and with CRLF."""
    page = b"vllm:num_requests_waiting 1\r\nvllm:gpu_cache_usage_perc 0.5\r\nvllm:gpu_prefix_cache_hits_total 7\r\n"
    assert read_load(page) == EngineLoad(1, None, 0.5, None, None, 7)


@pytest.mark.parametrize(
    ("lines", "tokens"),
    [
        (['cache_config_info{enable_prefix_caching="False",block_size="16",num_gpu_blocks="9"} 1'], 0),
        (['cache_config_info{block_size="16",num_gpu_blocks="None",num_gpu_blocks_override="9"} 1'], None),
        (['cache_config_info{block_size="16",num_gpu_blocks="999999999999999"} 1'], None),
        (["cache_config_info 1"], None),
        (['cache_config_info{block_size="16",num_gpu_blocks="9"} 1'] * 2, 288),
        (
            [
                'cache_config_info{block_size="16",num_gpu_blocks="9"} 1',
                "external_prefix_cache_queries_total 70",
            ],
            None,
        ),
    ],
)
def test_what_a_cache_holds_is_read(lines: list[str], tokens: int | None) -> None:
    """Nothing if it is off; unknown where its engine does not say, or has another cache behind it."""
    page = "".join(f"vllm:{line}\n" for line in ["num_requests_waiting 1", *lines]).encode()
    assert read_load(page) == EngineLoad(1, cache_tokens=tokens)


def test_a_figure_under_two_names_counts_once() -> None:
    """As vLLM told some while it renamed them."""
    lines = ["num_requests_waiting 1"]
    for prefix, old in (("", 7), ("gpu_", 8)):
        lines += [f"{prefix}prefix_cache_queries_total {old}", f"{prefix}prefix_cache_hits_total {old - 5}"]
    page = "".join(f"vllm:{line}\n" for line in lines).encode()
    assert read_load(page) == EngineLoad(1, prefix_queries=7, prefix_hits=2)


def test_engine_cores_are_added_up() -> None:
    """Of several KV caches the fullest counts: it preempts first."""
    page = b"".join(
        b'vllm:num_requests_waiting{engine="%d"} 2\nvllm:kv_cache_usage_perc{engine="%d"} 0.%d\n' % (core, core, core)
        for core in range(1, 4)
    )
    assert read_load(page) == EngineLoad(6, kv_usage=0.3)


@pytest.mark.parametrize("value", [b"NaN", b"-1", b"+Inf", b"-Inf", b"1e308", b"", b"one", b"0x10", b"1e7", b"1" * 41])
def test_an_impossible_number_of_waiting_requests_is_no_load(value: bytes) -> None:
    """Nothing follows from such a page."""
    assert read_load(b"vllm:num_requests_waiting " + value + b"\nvllm:num_requests_running 3\n") is None


def test_a_page_without_waiting_requests_is_no_load() -> None:
    """As of engines that have other metrics, or none."""
    for page in (b"", b"<html>", b"llamacpp:requests_deferred 3\n", b"vllm:num_requests_running 3\n"):
        assert read_load(page) is None


@pytest.mark.parametrize("value", [b"NaN", b"-0.1", b"1.01", b"1e308", b"45.67"])
def test_an_impossible_figure_beside_it_is_left_out(value: bytes) -> None:
    """What waits counts all the same."""
    page = b"vllm:num_requests_waiting 2\nvllm:kv_cache_usage_perc " + value + b"\nvllm:num_preemptions_total -1\n"
    assert read_load(page) == EngineLoad(2)


def test_deferred_requests_are_never_more_than_wait() -> None:
    """Also where the page contradicts itself."""
    for deferred in (b"9", b"NaN", b"+Inf", b"-3"):
        page = b'vllm:num_requests_waiting 2\nvllm:num_requests_waiting_by_reason{reason="deferred"} ' + deferred
        load = read_load(page + b"\n")
        assert load is not None
        assert load.waiting == (0 if deferred == b"9" else 2)


_names = st.sampled_from(
    [
        "num_requests_waiting", "num_requests_waiting_by_reason", "num_requests_running", "kv_cache_usage_perc",
        "gpu_cache_usage_perc", "num_preemptions_total", "prefix_cache_hits_total", "other",
    ]
)  # fmt: skip
_values = st.floats().map(repr) | st.integers().map(str) | st.text(max_size=5)


@given(st.lists(st.tuples(_names, st.sampled_from(["", '{a="b"}', '{reason="deferred"}', "{", "}"]), _values)))
def test_any_page_gives_a_possible_load_or_none(samples: list[tuple[str, str, str]]) -> None:
    """Whatever an engine says."""
    page = "".join(f"vllm:{name}{labels} {value}\n" for name, labels, value in samples)
    load = read_load(page.encode("utf-8", "surrogatepass"))
    if load is not None:
        assert 0 <= load.waiting <= MAX_REQUESTS * len(samples)
        assert load.running is None or load.running >= 0
        assert load.kv_usage is None or 0 <= load.kv_usage <= 1
        assert load.preemptions is None or load.preemptions >= 0
