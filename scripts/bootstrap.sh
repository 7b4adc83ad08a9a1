#!/bin/sh
# Usage: bootstrap.sh VENV SET   (SET: runtime, ray or dev)
#
# Creates VENV with a Python of 3.11 to 3.13 and installs the versions of requirements/SET.lock and this checkout into
# it. Needs nothing but that Python (PYTHON names one to use). The stamp is written last, so that an interrupted run is
# done again.
set -eu
venv=$1
set_name=$2

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if command -v "$name" >/dev/null 2>&1 && supported "$name"; then
            command -v "$name"
            return 0
        fi
    done
    echo "inferq needs Python 3.11, 3.12 or 3.13 and found none${PYTHON:+ at $PYTHON}." >&2
    echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3.12" >&2
    return 1
}

if ! { supported "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    python=$(find_python)
    echo "inferq: creating $venv with $("$python" --version)"
    if ! "$python" -m venv --clear "$venv"; then
        echo "inferq: $python cannot create a virtual environment (Debian, Ubuntu: apt-get install python3-venv)." >&2
        exit 1
    fi
fi

lock=requirements/$set_name.lock
echo "inferq: installing $(grep -c '==' "$lock") locked packages into $venv (once; half a minute or so)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements/build.lock -r "$lock"
# setuptools warns of every editable installation; nothing here can be mistaken for another package.
PYTHONWARNINGS=ignore "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
touch "$venv/.installed-$set_name"
# Each set holds those before it.
case $set_name in
dev) touch "$venv/.installed-runtime" "$venv/.installed-ray" ;;
ray) touch "$venv/.installed-runtime" ;;
esac
echo "inferq: $venv is ready"
