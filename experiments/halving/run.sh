#!/usr/bin/env bash
# Successive halving against training all 16 configurations to their end, three seeds each.
#   experiments/halving/run.sh FOLDER [SETTINGS ...]
set -euo pipefail
folder=$1
shift
rows=$(python -c "import lora_lightning; print(lora_lightning.__path__[0])")/data/embedded/reviews
for seed in 0 1 2; do
  run() {
    lora-lightning train -m sweep=halving hydra/launcher=packed seed=$seed test_before=false \
      data.train="$rows/train.jsonl" data.val="$rows/test.jsonl" data.test="$rows/val.jsonl" \
      hydra.sweep.dir="$folder/$1-$seed" "${@:2}"
  }
  run halving "$@"
  run exhaustive launcher.halving=null "$@"
done
python "$(dirname "$0")/compare.py" "$folder" --csv "$(dirname "$0")/results.csv"
