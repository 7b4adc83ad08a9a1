"""Servers that stand in for engines that do not run here, one module each."""

from .fake import ANSWER, FakeEngine, recorded
from .llamacpp import FakeLlamacpp
from .ollama import FakeOllama
from .sglang import FakeSglang
from .tgi import FakeTgi

FAKES: dict[str, type[FakeEngine]] = {
    "llamacpp": FakeLlamacpp,
    "ollama": FakeOllama,
    "sglang": FakeSglang,
    "tgi": FakeTgi,
}

__all__ = ["ANSWER", "FAKES", "FakeEngine", "FakeLlamacpp", "FakeOllama", "FakeSglang", "FakeTgi", "recorded"]
