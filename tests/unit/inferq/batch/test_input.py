"""Prompts, tables and requests become the input file of a batch; what cannot says where and why."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from inferq.batch.input import Format, Prepared, Shape, fill, format_of, open_source, read_parameter
from queue_schemas import BadRequest


def prepared(path: Path, form: Format | None = None, **shape: Any) -> tuple[Prepared, list[dict[str, Any]]]:
    """What is made of a file."""
    written = io.BytesIO()
    with open_source(path, form) as source:
        made = source.write(Shape(**{"model": "m"} | shape), written)
    return made, [json.loads(line) for line in written.getvalue().splitlines()]


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_line_of_text_is_a_prompt(tmp_path: Path) -> None:
    """Empty lines are none; the id says the line; a byte order mark is not part of it."""
    path = file(tmp_path, "prompts.txt", "\ufeffFirst\n\n  \nSecond\r\n")
    made, requests = prepared(path, system="Be brief.", max_tokens=9, parameters={"temperature": 0})
    assert made == Prepared("/v1/chat/completions", 2)
    assert [request["custom_id"] for request in requests] == ["line-1", "line-4"]
    assert requests[1] == {
        "custom_id": "line-4",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "m",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Second"}],
            "max_tokens": 9,
            "temperature": 0,
        },
    }
    assert requests[0]["body"]["messages"][1]["content"] == "First"


def test_a_table_fills_a_template(tmp_path: Path) -> None:
    """Cells may hold commas, line ends and quotes; a column gives the ids."""
    path = file(tmp_path, "t.csv", 'key,text,n\na,"one, ""two""\nthree",1\nb,four,2\n')
    _, requests = prepared(path, template="{n}) {{Summarise}}: {text}", id_column="key")
    assert [request["custom_id"] for request in requests] == ["a", "b"]
    assert requests[0]["body"]["messages"][0]["content"] == '1) {Summarise}: one, "two"\nthree'
    tabs = file(tmp_path, "t.tsv", "prompt\tid\nhi\t7\n")
    assert prepared(tabs)[1][0]["custom_id"] == "7"


def test_rows_with_prompts_or_messages_become_requests(tmp_path: Path) -> None:
    """As benchmarks have them, also gzipped: task_id is the id; a template takes any field."""
    row = {"task_id": "HumanEval/0", "prompt": "def f():", "tags": ["a"]}
    path = file(tmp_path, "h.jsonl.gz", gzip.compress(json.dumps(row).encode() + b"\n"))
    _, requests = prepared(path)
    assert requests[0]["custom_id"] == "HumanEval/0"
    assert requests[0]["body"]["messages"] == [{"role": "user", "content": "def f():"}]
    _, requests = prepared(path, template="{tags} {prompt}")
    assert requests[0]["body"]["messages"][0]["content"] == '["a"] def f():'
    chat = file(tmp_path, "c.jsonl", json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    assert prepared(chat, system="s")[1][0]["body"]["messages"][0]["role"] == "system"


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 5}),
        ("/v1/responses", {"model": "m", "input": "x", "max_output_tokens": 5}),
    ],
)
def test_each_endpoint_has_its_own_words(tmp_path: Path, endpoint: str, body: dict[str, Any]) -> None:
    """For the prompt and for its limit."""
    made, requests = prepared(file(tmp_path, "p.txt", "x"), endpoint=endpoint, max_tokens=5)
    assert (made.endpoint, requests[0]["url"], requests[0]["body"]) == (endpoint, endpoint, body)


def test_embeddings_take_an_input(tmp_path: Path) -> None:
    """Nothing beside."""
    _, requests = prepared(file(tmp_path, "p.txt", "x"), endpoint="/v1/embeddings")
    assert requests[0]["body"] == {"model": "m", "input": "x"}


def test_whole_requests_are_passed_on(tmp_path: Path) -> None:
    """With every field; where they go is what they say. What is for prompts is refused, not dropped."""
    request = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "e", "input": "x"}}
    path = file(tmp_path, "r.jsonl", json.dumps(request) + "\n")
    made, requests = prepared(path, model="")
    assert (made.endpoint, requests) == ("/v1/embeddings", [request])
    with pytest.raises(BadRequest, match=r"r.jsonl line 1 is a whole request: --model"):
        prepared(path)


@pytest.mark.parametrize(
    ("name", "content", "shape", "words"),
    [
        ("e.jsonl", "", {}, "e.jsonl has no lines with requests"),
        ("e.csv", "text\n", {}, "e.csv has no lines"),
        ("u.txt", b"good\nb\xe4d\n", {}, "u.txt line 2 is not UTF-8"),
        ("j.jsonl", '{"prompt": "x"}\n{"prompt\n', {}, "j.jsonl line 2 is not JSON"),
        ("l.jsonl", '["x"]', {}, "l.jsonl line 1 is not a JSON object"),
        ("n.jsonl", '{"text": "x"}', {}, "n.jsonl line 1 has no text 'prompt'; it has: text. Make one"),
        ("c.csv", "text\nx\n", {"template": "{txt}"}, "c.csv line 2 has no 'txt' for the template; it has: text"),
        ("f.csv", "a,b\n1\n", {"template": "{a}"}, "f.csv line 2 has fewer cells"),
        ("m.csv", "a,b\n1,2,3\n", {"template": "{a}"}, "m.csv line 2 has more cells"),
        ("q.csv", 'a\n"x', {"template": "{a}"}, "q.csv line 2 is not a table"),
        ("i.csv", "a\nx\n", {"template": "{a}", "id_column": "k"}, "i.csv line 2 has no 'k', which --id-column"),
        ("i.csv", "a,k\nx,\n", {"template": "{a}", "id_column": "k"}, "'k' is empty"),
        ("p.txt", "x", {"endpoint": "/v1/score"}, "give whole requests"),
        ("p.txt", "x", {"endpoint": "/v1/embeddings", "system": "s"}, "--system cannot be used"),
        ("p.txt", "x", {"endpoint": "/v1/embeddings", "max_tokens": 1}, "--max-tokens cannot be used"),
        ("g.jsonl.gz", b"not packed", {}, "g.jsonl.gz cannot be read"),
        ("g.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 99, mtime=0)[:-9], {}, "g.jsonl.gz cannot be read"),
        ("x.parquet", "x", {}, "give --format"),
    ],
)
def test_what_cannot_be_read_says_where(
    tmp_path: Path, name: str, content: str | bytes, shape: dict[str, Any], words: str
) -> None:
    """File, line and what to do."""
    with pytest.raises(BadRequest) as refused:
        prepared(file(tmp_path, name, content), **shape)
    assert words in refused.value.message


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    """And a folder is no file."""
    (tmp_path / "d.csv").mkdir()
    for name in ("none.csv", "d.csv"):
        with pytest.raises(BadRequest, match="cannot be read"):
            prepared(tmp_path / name)


def test_names_say_what_files_hold() -> None:
    """Whatever their case, packed or not."""
    names = ("A.JSONL", "a.ndjson", "a.csv.gz", "a.tsv", "a.txt")
    assert [format_of(Path(name)) for name in names] == ["jsonl", "jsonl", "csv", "tsv", "txt"]


def test_parameters_are_json_where_they_can_be() -> None:
    """And text elsewhere; a word alone is none."""
    texts = ("temperature=0.5", "stop=[1]", "user=me=you", "x=")
    assert [read_parameter(text)[1] for text in texts] == [0.5, [1], "me=you", ""]
    with pytest.raises(BadRequest, match="NAME=VALUE"):
        read_parameter("temperature")


def test_a_template_looks_at_columns_only() -> None:
    """Not at their attributes, as Python's own formatting would."""
    with pytest.raises(BadRequest, match=r"has no 'a\.__class__'"):
        fill("{a.__class__}", {"a": "x"}, "here")
