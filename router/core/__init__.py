"""The Router's decisions, pure: admission, reading requests, stitching answers, the directory of models."""

from .admission import (
    BACKGROUND_HEADER,
    DEADLINE_HEADER,
    IDEMPOTENCY_HEADER,
    ON_LOSS_HEADER,
    RESUMABLE_HEADER,
    KeyRing,
    announced_size,
    authenticate,
    check_model,
    check_size,
    parse_keys,
    read_deadline,
    read_flag,
    read_idempotency_key,
    read_on_loss,
)
from .deadlines import Deadline, find_deadline
from .directory import Directory, OnNoWorker, PoolEntry, build_directory, model_list, model_object, pool_list, pool_of
from .event_stream import ClientEvents, as_event, is_events
from .events import LAST_EVENT_HEADER, EventNumbers, Position, find_position, read_position
from .openai import INFERENCE_PATHS, RequestFields, known_paths, read_fields
from .shares import Share, tenant_limit
from .stitch import EVENT_STREAM, Head, Stitch, ending_error

__all__ = [
    "BACKGROUND_HEADER",
    "DEADLINE_HEADER",
    "EVENT_STREAM",
    "IDEMPOTENCY_HEADER",
    "INFERENCE_PATHS",
    "LAST_EVENT_HEADER",
    "ON_LOSS_HEADER",
    "RESUMABLE_HEADER",
    "ClientEvents",
    "Deadline",
    "Directory",
    "EventNumbers",
    "Head",
    "KeyRing",
    "OnNoWorker",
    "PoolEntry",
    "Position",
    "RequestFields",
    "Share",
    "Stitch",
    "announced_size",
    "as_event",
    "authenticate",
    "build_directory",
    "check_model",
    "check_size",
    "ending_error",
    "find_deadline",
    "find_position",
    "is_events",
    "known_paths",
    "model_list",
    "model_object",
    "parse_keys",
    "pool_list",
    "pool_of",
    "read_deadline",
    "read_fields",
    "read_flag",
    "read_idempotency_key",
    "read_on_loss",
    "read_position",
    "tenant_limit",
]
