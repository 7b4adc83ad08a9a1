"""Files in the store: whole or not there, listed, expired, counted and swept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_schemas import BadRequest, BodyTooLarge, Tenant
from storage import (
    FileRecord,
    FileStore,
    ObjectMissing,
    ObjectStore,
    Part,
    StorageSettings,
    folder_of,
    new_file_id,
    sweep_expired,
    sweep_leftovers,
    tenant_of,
)
from storage.names import created_ms

NOW_S = 1_800_000_000
A, B = Tenant("a~b/../ä"), Tenant("b")


@pytest.fixture(params=["folder", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileStore]:
    if request.param == "folder":
        yield FileStore(ObjectStore.open(StorageSettings(url=str(tmp_path / "store"))))
        return
    yield FileStore(ObjectStore.open(StorageSettings(url="memory://inferq-files")))
    fsspec.filesystem("memory").store.clear()


def put(
    files: FileStore,
    tenant: Tenant = A,
    data: bytes = b"x",
    *,
    at_s: int = NOW_S,
    purpose: str = "batch",
    lives_s: int = 0,
) -> FileRecord:
    """A file with these bytes, made at that time."""
    file_id = new_file_id(at_s * 1000)
    with files.upload(tenant, file_id, 1_000) as upload:
        upload.write(data)
    record = FileRecord(
        id=file_id, tenant=tenant, filename="f", purpose=purpose, created_at=at_s, bytes=upload.size,
        expires_at=at_s + lives_s if lives_s else None, sha256=upload.sha256, parts=upload.parts,
    )  # fmt: skip
    files.add(record)
    return record


def everything(files: FileStore) -> list[str]:
    return sorted(files.store.sizes(""))


def test_a_file_is_there_once_it_is_added_and_gone_once_deleted(files: FileStore) -> None:
    """Its record is what makes it a file; only its tenant has it; after its end nothing is left of it."""
    record = put(files, data=b"hello", lives_s=60)
    assert files.get(A, record.id, NOW_S) == record
    assert files.get(B, record.id, NOW_S) is None
    assert b"".join(files.read(record)) == b"hello"
    assert record.sha256.startswith("2cf24dba")
    files.delete(record)
    files.delete(record)
    assert files.get(A, record.id, NOW_S) is None
    assert everything(files) == []
    with pytest.raises(ObjectMissing):
        list(files.read(record))


@pytest.mark.parametrize("file_id", ["", "file-", "file-../../x", "batch_" + "0" * 32, "file-" + "0" * 31 + "G"])
def test_only_ids_become_names(files: FileStore, file_id: str) -> None:
    """What is no id is no file, and never part of a path."""
    assert files.get(A, file_id, NOW_S) is None


def test_an_upload_that_breaks_off_or_grows_too_large_leaves_nothing(files: FileStore) -> None:
    """Before its commit and after it, discarding leaves no object; nor does a file past its limit."""
    file_id = new_file_id(NOW_S * 1000)
    with pytest.raises(BodyTooLarge, match="more than 3 bytes"), files.upload(A, file_id, 3) as upload:
        upload.write(b"123")
        upload.write(b"4")
    late = files.begin(A, file_id, 3)
    late.commit()
    late.discard()
    late.discard()
    assert [name for name in everything(files) if "part" in name] == []


@given(sizes=st.lists(st.integers(0, 7), max_size=6), start=st.integers(0, 20), length=st.none() | st.integers(0, 20))
def test_any_range_of_a_file_in_parts_is_read(sizes: list[int], start: int, length: int | None) -> None:
    """Whatever its parts, a range gives the bytes of the whole."""
    files = FileStore(ObjectStore.open(StorageSettings(url="memory://inferq-ranges")))
    whole = bytes(range(sum(sizes)))
    parts, at = [], 0
    for number, size in enumerate(sizes):
        name = FileStore.part_name(A, "file-" + "0" * 32, number)
        files.store.put(name, whole[at : at + size])
        parts.append(Part(name=name, size=size))
        at += size
    record = FileRecord(
        id="file-" + "0" * 32, tenant=A, filename="f", purpose="batch", created_at=0, bytes=at, parts=tuple(parts)
    )
    end = None if length is None else start + length
    assert b"".join(files.read(record, start, end)) == whole[start:end]
    fsspec.filesystem("memory").store.clear()


def test_a_list_goes_by_age_in_pages_and_by_purpose(files: FileStore) -> None:
    """Newest first or oldest first, behind any id, a deleted one included; expired files are not in it."""
    records = [put(files, at_s=NOW_S + number, purpose="batch" if number % 2 else "vision") for number in range(7)]
    put(files, B)
    put(files, at_s=NOW_S - 100, lives_s=50)
    ids = [record.id for record in records]
    page, more = files.page(A, NOW_S, limit=3)
    assert ([record.id for record in page], more) == (ids[:3:-1], True)
    files.delete(page[-1])
    page, more = files.page(A, NOW_S, after=page[-1].id, limit=4)
    assert ([record.id for record in page], more) == (ids[3::-1], False)
    page, more = files.page(A, NOW_S, order="asc", purpose="vision", limit=2)
    assert ([record.id for record in page], more) == ([ids[0], ids[2]], True)
    assert files.page(Tenant("nobody"), NOW_S) == ([], False)


def test_what_a_tenant_keeps_is_counted(files: FileStore) -> None:
    """Files and all bytes, parts that have no record yet included."""
    put(files, data=b"12345")
    files.store.put(FileStore.part_name(A, new_file_id(NOW_S * 1000), 0), b"1234567")
    kept = files.usage(A)
    assert kept.files == 1
    assert 12 < kept.bytes < 1_000
    assert files.usage(B).bytes == 0


def test_expired_files_are_removed_but_those_in_use(files: FileStore) -> None:
    """Readers do not see them in any case; a live batch's input stays until it is not in use; late marks go too."""
    used, old, young = put(files, lives_s=5), put(files, lives_s=5), put(files, lives_s=500)
    assert files.get(A, used.id, NOW_S + 5) is None
    assert files.get(A, used.id, 0) == used
    assert sweep_expired(files, NOW_S + 5, {used.id}) == 1
    assert (files.get(A, used.id, 0), files.get(A, old.id, 0)) == (used, None)
    assert sweep_expired(files, NOW_S + 5) == 1
    assert sweep_expired(files, NOW_S + 5) == 0
    assert files.get(A, young.id, NOW_S + 5) == young
    files.store.delete([f"{folder_of(A)}/files/{young.id}/record"])
    sweep_expired(files, NOW_S + 500)
    assert files.store.names("expiring") == []


def test_leftovers_of_a_death_are_removed_in_time(tmp_path: Path) -> None:
    """Parts without a record and what was half written go when they are old, unless their id is in use; files stay."""
    files = FileStore(ObjectStore.open(StorageSettings(url=str(tmp_path / "store"))))
    whole = put(files, at_s=NOW_S - 10 * 86_400)
    old, used, young = (new_file_id((NOW_S - days * 86_400) * 1000) for days in (4, 4, 1))
    for file_id in (old, used, young):
        files.store.put(FileStore.part_name(A, file_id, 0), b"1")
    begun = files.begin(A, young, 10)
    begun.write(b"half")
    (scratch,) = (tmp_path / "store" / ".writing").iterdir()
    os.utime(scratch, (NOW_S - 3_600, NOW_S - 3_600))
    assert sweep_leftovers(files, NOW_S, {used}) == 1
    assert files.store.names(f"{folder_of(A)}/files") == sorted((whole.id, used, young))
    os.utime(scratch, (NOW_S - 90_000, NOW_S - 90_000))
    assert sweep_leftovers(files, NOW_S, {used}) == 1
    assert list((tmp_path / "store" / ".writing").iterdir()) == []


@given(st.text(min_size=1, max_size=15))
def test_a_tenants_folder_is_its_own(name: str) -> None:
    """Any tenant's folder is one plain name, and leads back to it."""
    folder = folder_of(Tenant(name))
    assert "/" not in folder
    assert tenant_of(folder) == name


def test_names_and_times() -> None:
    """A tenant's name that no file's name has room for is refused with what to do; an id tells when it was made."""
    with pytest.raises(BadRequest, match="too long for the file store"):
        folder_of(Tenant("ä" * 100))
    assert created_ms(new_file_id(1_234_567_890_123)) == 1_234_567_890_123


def test_what_lies_in_a_folder_is_nobody_elses(tmp_path: Path) -> None:
    """Other users of the machine may not read what was uploaded; a private object is its owner's alone."""
    store = ObjectStore.open(StorageSettings(url=str(tmp_path / "new" / "store")))
    store.put("a/plain", b"1")
    store.put("a/secret", b"1", private=True)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new").rglob("*")}
    assert modes["secret"] == 0o600
    assert all(mode & 0o007 == 0 for mode in modes.values())
