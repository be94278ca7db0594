#!/usr/bin/env bash
# A sentiment classifier by LoRA's ranks, its targets, its family, and full fine-tuning; three seeds each.
#   experiments/quality/run.sh TRAIN.jsonl DEV.jsonl OTHER.jsonl FOLDER [SETTINGS ...]
# DEV is measured at the end, with OTHER, of another domain; nothing is chosen by either. FAMILY=no: without variants.
set -euo pipefail
train=$1 dev=$2 other=$3 folder=$4
shift 4
settings=(data=files data.train="$train" data.val="$dev" data.test="$other" test_before=false data.batch_size=32
  data.max_length=128 trainer.max_epochs=1 trainer.precision=32-true optim.lr=1e-3 callbacks=none callbacks.best=null
  callbacks.last=null callbacks.progress_bar=null seed=0,1,2 "$@")
run() { lora-lightning train -m "${settings[@]}" hydra.sweep.dir="$folder/$1" "${@:2}"; }
packed=hydra/launcher=packed

run ranks $packed lora.rank=1,8,64
run attention $packed 'lora.targets=[query,key,value,attention.output.dense]'
run mlp $packed "lora.targets='.*layer\.[0-9]+\.(intermediate|output)\.dense'"
run full lora=full optim.lr=1e-4
[[ ${FAMILY:-yes} == no ]] && exit
run family $packed lora=rslora,dora,pissa,olora,eva,lora_fa
run loraplus $packed optim=loraplus optim.lr=2e-4
