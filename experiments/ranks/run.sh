#!/usr/bin/env bash
# LoRA of ranks 1 to 64 and full fine-tuning of tiny_lm: the same rows, the same steps.
#   experiments/ranks/run.sh TRAIN.jsonl DEV.jsonl FOLDER [SETTINGS ...]
set -euo pipefail
train=$1 dev=$2 folder=$3
shift 3
settings=(task=summarization data.train="$train" data.val="$dev" data.test_fraction=0 data.limit_val=200
  task.generate_rows=0 test_before=false trainer.max_epochs=1 callbacks=none callbacks.progress_bar=null "$@")
run() { lora-lightning train -m "${settings[@]}" hydra.sweep.dir="$folder/$1" "${@:2}"; }

run lora lora.rank=1,2,4,8,16,32,64 optim.lr=3e-3,1e-2
run full lora=full optim.lr=3e-4,1e-3,3e-3
