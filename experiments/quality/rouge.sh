#!/usr/bin/env bash
# Sentences from a restaurant's properties (E2E) by LoRA's ranks, its targets, and full fine-tuning; three seeds each.
#   experiments/quality/rouge.sh TRAIN.jsonl TEST.jsonl FOLDER [SETTINGS ...]
# The learning rates are those that experiments/ranks found best by loss.
set -euo pipefail
train=$1 test=$2 folder=$3
shift 3
settings=(task=summarization data=files data.train="$train" data.test="$test" data.batch_size=8 task.generate_rows=-1
  test_before=false trainer.max_epochs=1 trainer.precision=32-true callbacks=none callbacks.best=null
  callbacks.last=null callbacks.progress_bar=null seed=0,1,2 "$@")
run() { lora-lightning train -m "${settings[@]}" hydra.sweep.dir="$folder/$1" "${@:2}"; }

run ranks lora.rank=1,8 optim.lr=1e-2
run high lora.rank=64 optim.lr=3e-3
run attention 'lora.targets=[q_proj,k_proj,v_proj,o_proj]' optim.lr=1e-2
run mlp 'lora.targets=[gate_proj,up_proj,down_proj]' optim.lr=1e-2
run full lora=full optim.lr=3e-3
