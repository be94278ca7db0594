"""Help text of `lora-lightning --help`."""

HELP = """\
lora-lightning: fine-tune language models with LoRA under PyTorch Lightning.

  lora-lightning VERB [KEY=VALUE ...]

Verbs
  train     train an adapter, then test the best one     lora-lightning train
  plan      memory and adapter sizes, without weights    lora-lightning plan model.name_or_path=X
  check     preflight: show what train would do          lora-lightning check data.train=my.csv
  evaluate  test an adapter                              lora-lightning evaluate adapter=DIR
  predict   use an adapter on a text or a file           lora-lightning predict adapter=DIR text=...
  chat      talk with a generative adapter               lora-lightning chat adapter=DIR
  report    compare the runs of a sweep                  lora-lightning report SWEEP_DIR
  merge     write base model + adapter as one model      lora-lightning merge adapter=DIR output=DIR
  export    for other engines, and whether they take it  lora-lightning export adapter=D check=vllm
  import    from a checkpoint, PEFT, or another tool     lora-lightning import source=X output=DIR
  combine   a new adapter from several, or one scaled    lora-lightning combine adapter=A,B output=C

The settings used most (train, plan, check)
  data.train=FILE          CSV, TSV, JSON, JSONL, Parquet, text file or folder; data.val, data.test
  data.path=ORG/NAME       a dataset of the Hugging Face hub
  task=NAME                classification; summarization, instruct, lm write text
  task.text_column=NAME    which column holds the text; task.label_column for the label
  model.name_or_path=X     hub name or local folder of any encoder, decoder or encoder-decoder
  lora.rank=8 lora.alpha=16 lora.targets=all-linear     or lora=full for full fine-tuning
  optim.lr=1e-3 trainer.max_epochs=3 data.batch_size=16 seed=0
  trainer.accelerator=gpu trainer.devices=8 trainer.strategy=ddp
  output_dir=DIR           the run's folder;   resume=DIR continues a run that was stopped
  experiment=NAME debug=NAME                   presets, see: lora-lightning train --help
  --config-dir FOLDER      presets of your own, in FOLDER/experiment, FOLDER/model and so on

More
  lora-lightning train --help        all groups and presets
  lora-lightning train --cfg job     the whole config, every key with its value
  lora-lightning train -m lora.rank=4,8 lora.alpha=8,16        a sweep
  eval "$(lora-lightning -sc install=bash)"                    tab completion
"""
