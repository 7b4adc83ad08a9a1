"""Responses of the Responses API, built from chat completions.

``request`` and ``messages`` say a request as a chat completion; ``events`` and ``objects`` turn what is kept of that
chat into the response and its numbered events; ``fields`` reads and refuses.
"""

from .events import ResponseEvents, as_server_sent
from .fields import Json
from .live import LiveResponse
from .note import read_note, write_note
from .objects import Asked, listed_input, response_object
from .request import Chat, as_chat, check_metadata
from .stitch import FIRST_SAID, ResponseStitch

__all__ = [
    "FIRST_SAID",
    "Asked",
    "Chat",
    "Json",
    "LiveResponse",
    "ResponseEvents",
    "ResponseStitch",
    "as_chat",
    "as_server_sent",
    "check_metadata",
    "listed_input",
    "read_note",
    "response_object",
    "write_note",
]
