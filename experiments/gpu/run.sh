#!/usr/bin/env bash
# The checks for a GPU: see README.md. Parts: run.sh 2 3 6; on a CPU: run.sh --rehearse --jobs 2
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
exec "${PYTHON:-python3}" "$here/suite.py" "$@"
