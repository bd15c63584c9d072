#!/bin/sh
# Installs the third-party packages of some packages of this repository into /opt/millrace, at the versions of requirements.lock.
#
#   install.sh protos libs/kit services/registry
#
# Runs as one step of an image, with uv mounted beside it, so that the layer holds nothing but what the service runs with.
set -eu
here=$(dirname "$0")
# Where every image mounts the cache, so that no layer keeps it.
export UV_LINK_MODE=copy UV_CACHE_DIR=/root/.cache/uv

[ -d /opt/millrace ] || uv venv -q --python python3 /opt/millrace
python=/opt/millrace/bin/python
site=$(echo /opt/millrace/lib/python3*/site-packages)
"$python" -B "$here/requirements.py" "$@" > /tmp/requirements.txt
uv pip install -q --python "$python" --constraint requirements.lock --overrides "$here/overrides.txt" -r /tmp/requirements.txt
# xds-protos ships an older copy of opentelemetry-proto's files over the real ones; put the real ones back (docs/decisions/0002).
if [ -d "$site/xds" ]; then
    uv pip install -q --python "$python" --no-deps --reinstall "$(grep '^opentelemetry-proto==' requirements.lock)"
fi

# What no running service reads: headers, static libraries, sources of extensions, other packages' tests, activation scripts.
rm -rf "$site"/pyarrow/include "$site"/pyarrow/src "$site"/torch/include "$site"/nvidia/*/include
rm -f "$site"/pyarrow/*flight*  # Arrow's own RPC
find "$site" -type f \( -name '*.a' -o -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' \) -delete
find "$site" -type d -name tests -not -path "$site/torch/*" -prune -exec rm -rf {} +
rm -f /opt/millrace/bin/activate* /opt/millrace/bin/*.bat /tmp/requirements.txt
# Compiled once here: the file system is read-only when a service runs. Files that are no Python 3 (templates) are left as they are.
"$python" -m compileall -q -j 0 "$site" > /dev/null 2>&1 || true
