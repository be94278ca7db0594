r"""The family in figures: what each variant trains, costs and weighs, and who reads its file.

    python experiments/variants/table.py [--rounds 3]

A Llama of 135 M parameters with random weights (speed does not depend on their values), each
variant by the command that a user types, in fresh processes, in turn; ratios are medians of the
rounds' own ratios to LoRA. "PEFT" compares logits of a stored adapter; "vLLM" goes by the rules in
its source.
Writes results.csv and prints the table.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "throughput"))

from contest import Work, compete, ours  # noqa: E402
from work import decoder_work  # noqa: E402

VARIANTS: dict[str, list[str]] = {
    "LoRA": [],
    "rsLoRA": ["lora=rslora"],
    "DoRA": ["lora=dora"],
    "PiSSA": ["lora=pissa"],
    "OLoRA": ["lora=olora"],
    "EVA": ["lora=eva"],
    "LoRA-FA": ["lora=lora_fa"],
    "LoRA+": ["optim=loraplus"],
    "LoRA on nf4": ["model.quantization=nf4"],
    "LoftQ on nf4": ["lora=loftq", "model.quantization=nf4"],
    "LoRA on int8": ["model.quantization=int8"],
    "full fine-tuning": ["lora=full"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--work", type=Path, default=None)
    arguments = parser.parse_args()
    arguments.work = arguments.work or Path(tempfile.mkdtemp())
    arguments.work.mkdir(exist_ok=True)
    work = decoder_work(arguments.work, 32, steps=arguments.steps, batch_size=arguments.batch_size)
    contestants = [ours("32-true", *more, name=name) for name, more in VARIANTS.items()]
    rows = compete("variants", contestants, work, arguments)
    with (HERE / "results.csv").open("w", newline="") as handle:
        fields = ("round", "contestant", "seconds", "peak_mib", "first_step")
        writer = csv.DictWriter(handle, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **{key: round(row[key], 3) for key in fields[2:]}} for row in rows)
    print(
        "| variant | setting | trained | adapter | step time | peak memory | PEFT | vLLM |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for contestant, (name, more) in zip(contestants, VARIANTS.items(), strict=True):
        cells = [name, f"`{' '.join(more)}`" if more else "", *adapter_of(more, work)]
        ratio = {
            key: statistics.median(
                row[key] / first[key]
                for row in rows
                for first in rows
                if row["contestant"] == contestant.name
                and first["contestant"] == contestants[0].name
                and first["round"] == row["round"]
            )
            for key in ("seconds", "peak_mib")
        }
        cells[4:4] = [f"{ratio['seconds']:.2f}", f"{ratio['peak_mib']:.2f}"]
        print(f"| {' | '.join(cells)} |")


def adapter_of(overrides: list[str], work: Work) -> list[str]:
    """Trained parameters, bytes of the file, whether PEFT has its logits, and what vLLM says."""
    import peft
    import torch

    from lora_lightning.adapters.export import engine_problems
    from lora_lightning.adapters.save import save_trained
    from lora_lightning.config.compose import compose_config, saved_settings, settings_of
    from lora_lightning.models.loading import load_generator
    from lora_lightning.tasks import build_task
    from lora_lightning.training.components import build_components

    common = ["task=summarization", f"model.name_or_path={work.model}", "model.dtype=float32"]
    common += [f"data.train={work.train}", f"data.val={work.train}", "data.test_fraction=0"]
    config = compose_config([*common, *overrides])
    settings = settings_of(config)
    module, data = build_components(settings, build_task(settings.task), seed=0)
    data.setup("fit")
    module.configure_model()
    model, adapter = module.model, module.adapter
    if adapter is None:
        count = sum(parameter.numel() for parameter in model.parameters())
        return [f"{count / 1e6:.2f} M", "", "", ""]
    model.eval()
    trained = [t for t in adapter.named_tensors().values() if t.requires_grad]
    count = sum(tensor.numel() for tensor in trained)
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in trained:
            tensor.add_(torch.randn_like(tensor) * 0.02)
    stored = Path(tempfile.mkdtemp()) / "adapter"
    save_trained(module, stored, saved_settings(config), base="")
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        ours_logits = model(input_ids=ids).logits
        base = load_generator(settings.model, module.tokenizer).eval()
        theirs: Any = peft.PeftModel.from_pretrained(base, stored).eval()
        gap = (theirs(input_ids=ids).logits - ours_logits).abs().max() / ours_logits.abs().max()
    problems = engine_problems(stored, "vllm")
    size = (stored / "adapter_model.safetensors").stat().st_size
    return [
        f"{count / 1e6:.2f} M",
        f"{size / 1e6:.1f} MB",
        "yes" if gap < 1e-3 else f"NO ({gap:.1g})",
        f"no: {problems[0].partition(':')[0].partition(',')[0]}" if problems else "yes",
    ]


if __name__ == "__main__":
    main()
