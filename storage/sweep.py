"""Remove expired files, and what processes that died left in the file store; the batcher calls it now and then.

Several processes may do so at once, and each may stop anywhere.
"""

from __future__ import annotations

from collections.abc import Collection

from telemetry import get_logger

from .files import FileStore, folder_of_file
from .idempotency_records import RequestRecords
from .names import FILE, created_ms, is_id, is_tenant_folder, tenant_of

LEFTOVER_AGE_S = 3 * 86_400
"""Age at which a file without a record is a leftover: uploads take hours at most, a batch's output a day."""
_SCRATCH_AGE_S = 86_400

log = get_logger(__name__)


def sweep_expired(files: FileStore, now_s: float, in_use: Collection[str] = ()) -> int:
    """Remove expired files, except those whose ids are ``in_use`` (inputs of live batches); how many.

    One listing, and some calls for each file. Expired files are invisible before they are removed.
    """
    removed = 0
    for record in files.expired(now_s):
        if record.id not in in_use:
            files.delete(record)
            removed += 1
    if removed:
        log.info("expired_files_removed", files=removed)
    return removed


def sweep_leftovers(files: FileStore, now_s: float, in_use: Collection[str] = ()) -> int:
    """Remove parts that never became a file, except of ids ``in_use`` (outputs that are being written); how many files.
    Removes expired records of requests, too.

    Lists everything in the store: call it about once an hour.
    """
    removed = files.store.clear_scratch(now_s - _SCRATCH_AGE_S)
    before_ms = (now_s - LEFTOVER_AGE_S) * 1000
    for folder in files.store.names(""):
        if not is_tenant_folder(folder):
            continue
        files.store.delete(RequestRecords(files.store).expired(tenant_of(folder), int(now_s * 1000)))
        whole, found = set(), set()
        for name in files.store.sizes(f"{folder}/files"):
            file_id, _, part = name.removeprefix(f"{folder}/files/").partition("/")
            found.add(file_id)
            if part == "record":
                whole.add(file_id)
        for file_id in found - whole:
            if is_id(file_id, FILE) and file_id not in in_use and created_ms(file_id) < before_ms:
                files.store.delete_below(folder_of_file(tenant_of(folder), file_id))
                removed += 1
    if removed:
        log.info("leftovers_removed", files=removed)
    return removed
