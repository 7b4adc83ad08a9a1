"""Make frames of what a worker sends over HTTP. Pure: the worker names nothing in them but their numbers and bytes."""

from __future__ import annotations

from queue_schemas import CONTINUED, END, HEAD, BadMessage, Frame
from queue_schemas.worker_protocol.output import Output

from .lease_tokens import HeldLease


def pack_output(held: HeldLease, output: Output, *, ends: bool) -> bytes:
    """The packed frames of ``output``; with ``ends`` the last of them is the attempt's end. Raises ``BadMessage`` for
    an answer that begins without a head."""
    pieces, seq = output.data, output.seq
    if ends and not pieces:
        pieces = [b""]
    if not pieces:
        return b""
    if (seq == 0) != (output.head is not None):
        raise BadMessage("head goes with piece 0 of an answer, and with no other", param="head")
    last = len(pieces) - 1
    pack = held.packer.pack
    if output.head is not None:
        head, lease = output.head, held.lease
        flags = HEAD | (CONTINUED if head.continued else 0) | (END if ends and last == 0 else 0)
        begin = Frame(
            lease.job.id,
            lease.epoch,
            lease.attempt_id,
            0,
            flags,
            pieces[0],
            head.status,
            head.content_type,
            head.headers,
        ).pack()
        rest = (pack(n, END if ends and n == last else 0, pieces[n]) for n in range(1, last + 1))
        return b"".join((begin, *rest))
    return b"".join([pack(seq + n, END if ends and n == last else 0, piece) for n, piece in enumerate(pieces)])
