#!/usr/bin/env bash
# LoRA by rank and full fine-tuning of a language model on E2E: what is learned, what is forgotten.
#   experiments/forgetting/run.sh TRAIN.jsonl DEV.jsonl MODEL TEXTS FOLDER [SETTINGS ...]
# TEXTS are what the model knew before. LORA_RATES and FULL_RATES are other learning rates.
set -euo pipefail
train=$1 dev=$2 model=$3 texts=$4 folder=$5
shift 5
settings=(task=summarization model.name_or_path="$model" data=files data.train="$train" data.val="$dev"
  data.test_fraction=0 data.limit_train=800 data.limit_val=100 data.batch_size=8 task.generate_rows=0
  test_before=false trainer.max_epochs=1 trainer.val_check_interval=20 trainer.precision=32-true
  callbacks=none callbacks.progress_bar=null callbacks.retention.texts="$texts" callbacks.retention.count=32
  seed=0,1,2 "$@")
run() { lora-lightning train -m "${settings[@]}" hydra.sweep.dir="$folder/$1" "${@:2}"; }

run lora lora.rank=1,8,64 optim.lr="${LORA_RATES:-1e-3,3e-3,1e-2}" hydra/launcher=packed
run full lora=full optim.lr="${FULL_RATES:-1e-4,3e-4,1e-3,3e-3}"
