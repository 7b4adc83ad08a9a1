"""What differs between engines that answer the OpenAI API: one small adapter each, and how a server's is found."""

from .detection import DIALECTS, OPENAI, VLLM, find_dialect
from .port import AdapterPaths, Ask, Dialect, NotContinuable, Reply

__all__ = [
    "DIALECTS",
    "OPENAI",
    "VLLM",
    "AdapterPaths",
    "Ask",
    "Dialect",
    "NotContinuable",
    "Reply",
    "find_dialect",
]
