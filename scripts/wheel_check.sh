#!/bin/sh
# Usage: wheel_check.sh PYTHON
#
# Builds the wheel, installs it (not this checkout) beside PYTHON's own dependencies in a new environment, and runs it
# from another folder: proves that everything it needs is inside.
set -eu
python=$1
packages="batches broker inferq manager openai_api queue_schemas router scheduling simulator storage telemetry webhooks worker"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

# From a copy: what an earlier build has left here must not get into the wheel, nor this one stay.
mkdir "$work/source"
# shellcheck disable=SC2086 - each package is a word
cp -r pyproject.toml README.md LICENSE $packages "$work/source"
"$python" -m build --wheel --no-isolation --outdir "$work/dist" "$work/source" >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
"$python" -m venv --without-pip "$work/venv"
"$python" - "$work" "$packages" <<'PYTHON'
"""Unpack the wheel as an installer would, and lend the new environment the dependencies, but not the checkout."""

import importlib.metadata
import pathlib
import sys
import sysconfig
import zipfile

work = pathlib.Path(sys.argv[1])
(wheel,) = (work / "dist").glob("*.whl")
site = next((work / "venv").glob("lib/python*/site-packages"))
with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    archive.extractall(site)
packages = {name.split("/")[0] for name in names if name.endswith("/__init__.py") and name.count("/") == 1}
expected = set(sys.argv[2].split())
missing = [f"{package}/py.typed" for package in expected if f"{package}/py.typed" not in names]
for folder in ("broker/lua", "broker/lua/lib"):
    scripts = [name for name in names if name.rpartition("/")[0] == folder and name.endswith(".lua")]
    missing += [] if scripts else [f"the scripts of {folder}"]
missing += [] if any(name.endswith("vllm_cpu.txt") for name in names) else ["the vLLM CPU set"]
missing += ["inferq/data/prompts.jsonl"] if "inferq/data/prompts.jsonl" not in names else []
if packages != expected or missing:
    sys.exit(f"the wheel holds the packages {sorted(packages)} and lacks {missing}")
own = {path.name for path in pathlib.Path(sysconfig.get_paths()["purelib"]).glob("__editable__*")}
assert own, "this checkout should be installed as editable"
links = [entry for entry in pathlib.Path(sysconfig.get_paths()["purelib"]).iterdir() if entry.name not in own]
for entry in links:
    if not entry.name.startswith("inferq-") and not (site / entry.name).exists():
        (site / entry.name).symlink_to(entry)
print(f"{wheel.name}: {len(names)} files, version {importlib.metadata.version('inferq')}")
PYTHON

cd "$work"
unset PYTHONPATH
# shellcheck disable=SC2086
"$work/venv/bin/python" -c 'import importlib, pathlib, sys
for package in map(importlib.import_module, sys.argv[1:]):
    assert pathlib.Path(package.__file__).is_relative_to(sys.prefix), package.__file__' $packages
"$work/venv/bin/python" -m inferq --version
"$work/venv/bin/python" -m inferq config --json | "$work/venv/bin/python" -c 'import json, sys; assert json.load(sys.stdin)'
for role in manager router worker batches webhooks; do
    "$work/venv/bin/python" -m "$role.service" --help >/dev/null
done
echo "the wheel runs from another folder"
