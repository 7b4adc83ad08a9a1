"""Files as clients see them (``openai.types.FileObject``), and the form that uploads one."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from storage import FileRecord

from .form import MAX_LIFE_S, MIN_LIFE_S, PURPOSES

UPLOAD_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": MIN_LIFE_S, "maximum": MAX_LIFE_S},
    },
}
"""JSON schema of the fields of ``POST /v1/files``."""


class FileObject(BaseModel):
    """A file. Times are Unix seconds."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileDeleted(BaseModel):
    """The answer to ``DELETE /v1/files/{id}``, as OpenAI's API defines it."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def file_object(record: FileRecord) -> FileObject:
    """The object that clients see of a stored file."""
    return FileObject(
        id=record.id,
        bytes=record.bytes,
        created_at=record.created_at,
        expires_at=record.expires_at,
        filename=record.filename,
        purpose=record.purpose,
    )
