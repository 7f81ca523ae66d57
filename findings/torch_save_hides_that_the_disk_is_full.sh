#!/usr/bin/env bash
# torch 2.13.0: torch.save to a full disk raises a RuntimeError that does not say so.
#
# A training that keeps its optimizer's state with torch.save, as the Trainer of transformers does, cannot tell a full
# disk from a fault of its own by the type of the error: it is no OSError, has no errno, and its text speaks of
# positions in a file. Python's own write to the same place raises OSError with ENOSPC. So code that handles a full
# disk by "except OSError" ends in a traceback here.
#
# Seen:   torch.save: RuntimeError, errno None, names the disk or the space: False
#         open().write: OSError, errno 28
# This script fails if torch.save raises an OSError, or says what is wrong. It needs Linux, for /dev/full.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import errno
import warnings

warnings.simplefilter("ignore")  # numpy is not installed, and not needed
import torch

try:
    torch.save({"moment": torch.zeros(1 << 20)}, "/dev/full")
except Exception as error:
    saved = error
try:
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(bytes(1 << 20))
except OSError as error:
    written = error
named = any(word in str(saved).lower() for word in ("disk", "space"))
print(f"torch.save: {type(saved).__name__}, errno {getattr(saved, 'errno', None)}, names the disk or the space: {named}")
print(f"open().write: {type(written).__name__}, errno {written.errno}")
assert type(saved) is RuntimeError and not named
assert written.errno == errno.ENOSPC
PYTHON
