#!/usr/bin/env bash
# Install torch before anything else can pull in its several-GB CUDA build on a machine without an NVIDIA GPU.
# Usage: install_torch.sh PYTHON [VERSION]
set -euo pipefail
python=$1
version=${2:-$(sed -n 's/^torch==//p' "$(dirname "$0")/constraints.txt")}

if "$python" -c "import sys, torch; sys.exit(torch.__version__.split('+')[0] != '$version')" 2>/dev/null; then
  exit 0
fi
install() { "$python" -m pip install --quiet "$@"; }
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  install "torch==$version"
else
  # Quietly: the first two are attempts, and the last one's errors are shown.
  install "torch==$version+cpu" 2>/dev/null ||
    install --retries 1 --timeout 15 --index-url https://download.pytorch.org/whl/cpu "torch==$version" 2>/dev/null ||
    install "torch==$version"
fi
"$python" -c 'import torch; print("torch", torch.__version__)' 2>/dev/null
