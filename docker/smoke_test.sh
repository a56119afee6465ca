#!/usr/bin/env bash
# Part of the build: the kernels load and are held to their reference on the CPU, FFCV writes and reads a file, models
# are what they were, and a training run makes one update and is tested. Needs no GPU and no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Caches too: left in /tmp of the image they would be closed to every other user.
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 HOME=$work TMPDIR=$work MPLCONFIGDIR=$work/matplotlib NUMBA_CACHE_DIR=$work/numba
python -c 'import convfirst_kernels.library as library; print("kernels:", library.__file__)'
python -m pytest --quiet -p no:cacheprovider --basetemp "$work/pytest" \
  kernels/tests/test_block.py tests/models tests/data/test_ffcv.py
python train.py run_root="$work" epochs=1 scheduler.warmup_epochs=0 trainer.accelerator=cpu trainer.limit_train_batches=1 \
  data.eval_batch_size=360 logger=csv
grep --quiet '"updates": 1,' "$work/digits/summary.json"
echo "smoke test passed"
