#!/usr/bin/env bash
# LoRA and full fine-tuning over learning rates and three seeds, validated often: how soon is a target reached?
#   experiments/convergence/run.sh sst2 TRAIN.jsonl DEV.jsonl TEXTS FOLDER [SETTINGS ...]
#   experiments/convergence/run.sh e2e  TRAIN.jsonl DEV.jsonl TEXTS FOLDER [SETTINGS ...]
# TEXTS are what the model knew before. Both methods run at once, one core each: whatever else the machine does,
# their seconds can be compared.
set -euo pipefail
task=$1 train=$2 dev=$3 texts=$4 folder=$5
shift 5
case $task in
  sst2)
    own=(task=classification data.limit_train=3200 data.limit_val=400 data.batch_size=32 data.max_length=128
      trainer.max_epochs=1 trainer.val_check_interval=10)
    lora=3e-4,1e-3,3e-3 full=3e-5,1e-4,3e-4
    ;;
  e2e)
    own=(task=summarization task.generate_rows=0 data.limit_train=1600 data.limit_val=100 data.batch_size=8
      trainer.max_epochs=1 trainer.val_check_interval=20)
    lora=1e-3,3e-3,1e-2 full=3e-4,1e-3,3e-3
    ;;
esac
settings=(data=files data.train="$train" data.val="$dev" data.test_fraction=0 test_before=false
  trainer.precision=32-true optim.scheduler=constant callbacks=none callbacks.best=null callbacks.last=null
  callbacks.progress_bar=null 'callbacks.throughput={_target_: lora_lightning.callbacks.Throughput}'
  callbacks.retention.texts="$texts" callbacks.retention.count=32 +callbacks.retention.max_length=128
  seed=0,1,2 "${own[@]}" "$@")
run() { OMP_NUM_THREADS=1 taskset -c "$core" lora-lightning train -m "${settings[@]}" hydra.sweep.dir="$folder/$1" "${@:2}"; }

core=0 run full lora=full optim.lr=$full &
core=1 run lora optim.lr=$lora &
wait %1
wait %2
