"""Ended batches: listed without reading more than the page, and removed when their time is over."""

from __future__ import annotations

from pathlib import Path

import pytest

from queue_schemas import Tenant
from storage import Batch, BatchRequest, BatchStatus, ObjectStore, StorageSettings
from storage.batches import BatchProgress, BatchStore

ACME = Tenant("acme")
NOW_S = 2_000_000_000
PAGE = 20


class CountingStore(ObjectStore):
    """A store in a folder that counts what is read."""

    def __init__(self, folder: Path) -> None:
        made = ObjectStore.open(StorageSettings.load(url=str(folder)))
        self.__dict__.update(vars(made))
        self.read_names: list[str] = []

    def get(self, name: str) -> bytes | None:
        self.read_names.append(name)
        return super().get(name)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path)


def _id(number: int) -> str:
    return f"batch_{NOW_S * 1000 + number:012x}{0:020x}"


def _ended(batches: BatchStore, number: int, *, at_s: int = NOW_S, cancelled: bool = False) -> str:
    """A batch that ended at ``at_s``, as Router and batcher leave it."""
    batch_id = _id(number)
    batches.create(
        BatchRequest(
            id=batch_id,
            tenant=ACME,
            input_file_id="file-" + "0" * 32,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            created_at=NOW_S,
            expires_at=NOW_S + 86_400,
            metadata={"number": str(number)},
        )
    )
    status = BatchStatus.CANCELLED if cancelled else BatchStatus.COMPLETED
    if cancelled:
        batches.ask_to_cancel(ACME, batch_id, at_s - 1)
    batches.set_progress(ACME, batch_id, BatchProgress(status=BatchStatus.IN_PROGRESS, total=3))
    batches.end(ACME, batch_id, BatchProgress(status=status, total=3, stamps={f"{status.value}_at": at_s}))
    batches.unmark(ACME, batch_id)
    return batch_id


def test_a_page_reads_one_object_for_each_ended_batch_on_it(store: CountingStore) -> None:
    """[G11] However many there are, a page of n ended batches costs n reads, and tells all that there is to tell."""
    batches = BatchStore(store)
    ids = [_ended(batches, number, cancelled=number % 2 == 0) for number in range(120)]
    store.read_names.clear()
    page, more = batches.page(ACME, limit=PAGE)
    assert (more, [batch.request.id for batch in page]) == (True, ids[: -PAGE - 1 : -1])
    assert len(store.read_names) <= PAGE + 1
    assert page == [batches.get(ACME, batch.request.id) for batch in page]
    assert [batch.cancel_asked_at for batch in page[:2]] == [None, NOW_S - 1]
    assert page[0].request.metadata == {"number": "119"}
    store.read_names.clear()
    assert batches.page(ACME, limit=PAGE) == (page, True)
    assert store.read_names == []  # what has ended is read once
    seen: list[Batch] = []
    more = True
    while more:
        page, more = batches.page(ACME, after=seen[-1].request.id if seen else "", limit=50)
        seen += page
    assert [batch.request.id for batch in seen] == ids[::-1]


def test_the_end_of_an_older_record_is_read_with_its_parts(store: CountingStore) -> None:
    """[G11] An end without what was asked, and one that is damaged, keep nothing from the others on the page."""
    batches = BatchStore(store)
    ids = [_ended(batches, number) for number in range(3)]
    store.put(BatchStore.name(ACME, ids[1], "end"), b'{"status": "completed", "total": 9}')
    store.put(BatchStore.name(ACME, ids[0], "end"), b"\0")
    page, more = batches.page(ACME)
    assert [(batch.request.id, batch.progress.total) for batch in page] == [(ids[2], 3), (ids[1], 9)]
    assert not more


def test_ended_batches_are_removed_oldest_first_and_so_many_at_once(store: CountingStore) -> None:
    """[G11] What ended long ago goes with all its objects; what ended since, or lives, stays."""
    batches = BatchStore(store)
    old = [_ended(batches, number, at_s=NOW_S + number) for number in range(7)]
    young = _ended(batches, 100, at_s=NOW_S + 1_000)
    before = NOW_S + 500
    assert batches.remove_ended(before, 5) == 5
    assert [batches.get(ACME, batch_id) is None for batch_id in old] == [True] * 5 + [False] * 2
    assert batches.remove_ended(before, 5) == 2
    assert batches.remove_ended(before, 5) == 0
    assert [batch.request.id for batch in batches.page(ACME)[0]] == [young]
    left = store.sizes("")
    assert not [name for name in left if any(batch_id in name for batch_id in old)]


def test_a_batch_whose_end_is_not_finished_is_not_removed(store: CountingStore) -> None:
    """[G11] Its webhook may have to be written yet, or its end: the batcher has the mark away only after both."""
    batches = BatchStore(store)
    batch_id = _ended(batches, 1)
    store.put(f"live/t-acme~{batch_id}", b"")
    assert batches.remove_ended(NOW_S + 10, 5) == 0
    store.delete([BatchStore.name(ACME, batch_id, "end")])
    assert batches.remove_ended(NOW_S + 10, 5) == 0
    assert batches.get(ACME, batch_id) is not None


def test_a_removal_that_broke_off_is_finished_by_the_next(store: CountingStore) -> None:
    """[G11] Whatever of a batch was removed already, the rest of it and its mark go the next time."""
    batches = BatchStore(store)
    for number, gone in enumerate((["end"], ["end", "request", "progress"])):
        batch_id = _ended(batches, number)
        store.delete([batches.name(ACME, batch_id, part) for part in gone])
    assert batches.remove_ended(NOW_S + 1, 10) == 2
    assert store.names("ended") == []
    assert batches.page(ACME, limit=PAGE) == ([], False)
