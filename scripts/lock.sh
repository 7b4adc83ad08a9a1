#!/bin/sh
# Usage: lock.sh PYTHON
#
# Writes requirements/*.lock anew for every supported Python and system from pyproject.toml, with uv (installed beside
# PYTHON if it is not there). Versions already locked are kept unless they no longer fit; remove a lock to renew it.
set -eu
python=$1
"$python" -m uv --version >/dev/null 2>&1 || "$python" -m pip install --quiet uv
compile() {
    "$python" -m uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
        --no-emit-index-url "$@"
}
mkdir -p requirements
echo 'setuptools>=77' | compile - -o requirements/build.lock
compile --extra otel pyproject.toml -o requirements/runtime.lock
compile --extra otel --extra ray pyproject.toml -c requirements/runtime.lock -o requirements/ray.lock
compile --extra dev pyproject.toml -c requirements/runtime.lock -c requirements/ray.lock -c requirements/build.lock -o requirements/dev.lock
wc -l requirements/*.lock
