#!/usr/bin/env bash
# What works on this machine's GPU and how fast, as JSON on the standard output, within five minutes.
#
#   tests/gpu/run.sh [--device cpu] > gpu.json
#
# Needs no network and no installation of this package: Python with torch 2.11 or later, transformers 5.17 or
# later, numpy and grpcio, and what `poe protos` has generated. What else is missing can be carried as wheels,
# whose folder WHEELS names: annotated-types, psutil and xxhash for all sections, and for the times
# protobuf, googleapis-common-protos, grpcio-health-checking, grpcio-reflection, opentelemetry-api, pydantic,
# pydantic-core, typing-inspection and jinja2. Sections that lack one say so, and the others run.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$root:$root/deployments${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --target "$site" "$WHEELS"/*.whl >&2
  export PYTHONPATH="$site:$PYTHONPATH"
fi
export HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE GRPC_VERBOSITY=NONE TOKENIZERS_PARALLELISM=false
"$python" -m tests.gpu.report "$@"
