"""Help texts, made from the signatures and docstrings of the verbs' functions."""

from __future__ import annotations

import inspect
import textwrap

from .commands import VERBS
from .parser import OVERRIDES, arguments_of

HELP = """\
lora-lightning: fine-tune language models with LoRA under PyTorch Lightning.

  lora-lightning VERB [KEY=VALUE ...]

Verbs; `lora-lightning VERB --help` shows the arguments of one
{verbs}

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


def overview() -> str:
    """Return the text of `lora-lightning --help`."""
    lines = []
    for verb in VERBS:
        typed = [each.typed for each in arguments_of(VERBS[verb]).values() if each.required]
        lines.append(f"  {verb:9} {_summary(verb):48} {' '.join([verb, *typed])}")
    return HELP.format(verbs="\n".join(lines))


def usage(verb: str) -> str:
    """Return the text of `lora-lightning VERB --help`."""
    arguments = arguments_of(VERBS[verb]).values()
    words = [each.typed if each.required else f"[{each.typed}]" for each in arguments]
    rows = [(each.typed, each.help) for each in arguments]
    if OVERRIDES in inspect.signature(VERBS[verb]).parameters:
        words.append("[KEY=VALUE ...]")
        rows.append(("KEY=VALUE", "Settings of the config, see: lora-lightning train --help"))
    line = textwrap.fill(
        " ".join(["lora-lightning", verb, *words]),
        width=98,
        initial_indent="  ",
        subsequent_indent="      ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    column = max((len(typed) for typed, _ in rows), default=0) + 2
    table = "".join(
        textwrap.fill(
            text, 98, initial_indent=f"  {typed:{column}}", subsequent_indent=" " * (column + 2)
        )
        + "\n"
        for typed, text in rows
    )
    return f"lora-lightning {verb}: {_summary(verb)}\n\n{line}\n\n{table}"


def _summary(verb: str) -> str:
    doc = inspect.getdoc(VERBS[verb]) or ""
    return doc.partition("\n")[0].rstrip(".")
