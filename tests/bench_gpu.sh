#!/usr/bin/env bash
# Measures what needs an NVIDIA GPU, unattended, in at most 7 minutes, without internet:
#
#     bash tests/bench_gpu.sh [gpu.txt]
#
# Each row is written to gpu.txt as soon as it is known, the most important first, so a run that is cut
# off keeps what it has. tests/bench_gpu.py says what is measured, and which variables change it.
# Packages that are missing are taken from a folder of wheels: WHEELS=../shared/gpu/wheels.
#
#     ANY_DEVICE=1 MODEL=smp_linknet_tu-test_resnet SIZE=64 BATCH=2 STEPS=3 CARS=3 COPIES=1 DRAW=96x64 N_FOLDS=3 bash tests/bench_gpu.sh
set -euo pipefail
file=$(realpath -m "${1:-${OUT:-.}/gpu.txt}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$(command -v python3)}
wheels=${WHEELS:-../shared/gpu/wheels}
if ! "$python" -c 'import albumentations, segmentation_models_pytorch' 2> /dev/null && [ -d "$wheels" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
  export PYTHONPATH=$site
fi
export PYTHONUNBUFFERED=1 NO_ALBUMENTATIONS_UPDATE=1 HF_HUB_OFFLINE=1
"$python" tests/bench_gpu.py "$file"
