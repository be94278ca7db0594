#!/usr/bin/env bash
# Rank x alpha x learning rate on E2E, packed: does the best learning rate depend on the rank?
#   experiments/rank_alpha_lr/run.sh TRAIN.jsonl DEV.jsonl FOLDER [SETTINGS ...]
# Once with alpha in a ratio to the rank, once with the same alpha for all ranks.
set -euo pipefail
train=$1 dev=$2 folder=$3
shift 3
settings=(task=summarization data=files data.train="$train" data.val="$dev" data.test_fraction=0
  data.limit_train=800 data.limit_val=100 data.batch_size=8 task.generate_rows=0 test_before=false
  trainer.max_epochs=1 trainer.precision=32-true callbacks=none callbacks.best=null callbacks.last=null
  callbacks.progress_bar=null hydra/launcher=packed lora.rank=2,16,128 "$@")
run() { lora-lightning train -m "${settings[@]}" hydra.sweep.dir="$folder/$1" "${@:2}"; }

run ratio lora.alpha_ratio=1,2,4 optim.lr=1e-3,3e-3,1e-2,3e-2
run same lora.alpha=16 optim.lr=3e-4,1e-3,3e-3,1e-2,3e-2,1e-1
