"""The Router's decisions, pure: admission, reading requests, stitching answers, the directory of models."""

from .admission import (
    DEADLINE_HEADER,
    ON_LOSS_HEADER,
    KeyRing,
    OnNoWorker,
    announced_size,
    authenticate,
    check_body_room,
    check_model,
    check_room,
    check_size,
    is_join_token,
    parse_keys,
    read_deadline,
    read_on_loss,
)
from .directory import Directory, PoolEntry, build_directory, model_list, model_object, pool_list, pool_of
from .openai import INFERENCE_PATHS, RequestFields, known_paths, read_fields
from .stitch import EVENT_STREAM, Head, Stitch

__all__ = [
    "DEADLINE_HEADER",
    "EVENT_STREAM",
    "INFERENCE_PATHS",
    "ON_LOSS_HEADER",
    "Directory",
    "Head",
    "KeyRing",
    "OnNoWorker",
    "PoolEntry",
    "RequestFields",
    "Stitch",
    "announced_size",
    "authenticate",
    "build_directory",
    "check_body_room",
    "check_model",
    "check_room",
    "check_size",
    "is_join_token",
    "known_paths",
    "model_list",
    "model_object",
    "parse_keys",
    "pool_list",
    "pool_of",
    "read_deadline",
    "read_fields",
    "read_on_loss",
]
