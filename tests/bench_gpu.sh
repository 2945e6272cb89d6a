#!/usr/bin/env bash
# Measures what needs an NVIDIA GPU, in under 20 minutes, and writes one text file:
#
#     bash tests/bench_gpu.sh gpu.txt
#
# The precisions at 1024 pixels and at the demo's size, the real input against batches that are already
# on the device, the tester, three folds side by side on one GPU, and the message when memory runs out.
set -uo pipefail
file=$(realpath "${1:-gpu.txt}")
cd "$(dirname "$0")/.."
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo 'no GPU here that torch can use'; exit 1; }
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
WORDS="INPUT=$temporary/demo OUTPUT=$temporary/output LOGS_PATH=$temporary/logs N_FOLDS=3 CROP_SIZE=1024"
WORDS="$WORDS TRAIN_BATCH_SIZE=8 ACCUMULATE_GRAD_BATCHES=1 ENCODER_WEIGHTS=None CACHE=True"

measure() {
  printf '\n$ %s\n' "$*"
  SECONDS=0
  timeout 400 "$@" 2>&1
  echo "status $?, $SECONDS s"
}

{
  date -u +%F
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  python -c 'import torch, pytorch_lightning as pl; print("torch", torch.__version__, "pytorch-lightning", pl.__version__)'
  python src/demo.py --only-draw --size 1918x1280 INPUT="$temporary"
  python src/folds.py $WORDS
  measure python src/test_precision.py --steps 50 $WORDS
  measure python src/test_precision.py --steps 200 --seeds 3 INPUT="$temporary/small" OUTPUT="$temporary/small"
  measure python tests/bench_training.py
  measure python tests/bench_prediction.py
  for fold in 0 1 2; do
    measure python src/Lightning_trainer.py $WORDS EPOCHS=2 "FOLDS=[$fold]" > "$temporary/fold$fold.txt" &
  done
  wait
  cat "$temporary"/fold?.txt
  measure python src/Lightning_trainer.py $WORDS TRAIN_BATCH_SIZE=128 CROP_SIZE=2048 CACHE=False 'FOLDS=[0]'
} | tee "$file"
