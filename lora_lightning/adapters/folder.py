"""Output of a run: the adapter folder and result.json."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_lightning.config.schema import PAUSE, ModelConfig
from lora_lightning.config.untrusted import check_task_state, settings_from_file
from lora_lightning.lora import Adapter, UserError, save_adapter
from lora_lightning.lora.embeddings import before_growth
from lora_lightning.lora.serialization.checksums import SIDECAR, check_content, write_checksums
from lora_lightning.lora.serialization.validation import check_trained
from lora_lightning.models.loading import fingerprint
from lora_lightning.tasks import Task
from lora_lightning.utils.locks import LOCK, locked
from lora_lightning.utils.output_folders import made_folder, refuse_loss, replaced_folder
from lora_lightning.utils.terminal import command

ADAPTER = "adapter"
"""Entry of a run's folder: the folder of the trained adapter or model."""
RESULT = "result.json"
HYDRA = ".hydra"
BAD_STEP = "bad_step.json"
"""Entry of a run's folder: the rows of a step whose loss was not a number."""
RUN_ENTRIES = (
    *(HYDRA, RESULT, BAD_STEP),
    *("checkpoints", "tensorboard", "csv", "samples.jsonl"),
)
OWN_ENTRIES = (*RUN_ENTRIES, PAUSE, ADAPTER)
"""Entries of a run's folder that no other command may write and no new run may find there."""
PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "hydra-core")


class Trained(Protocol):
    """Module that a folder is written from: `LoraModule`, or a module with the same attributes."""

    adapter: Adapter | None
    tokenizer: Any
    task: Task
    model_config: ModelConfig

    @property
    def model(self) -> nn.Module:
        """The model, with the adapter on it."""
        ...

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are trained and stored, by name."""
        ...


def save_trained(
    module: Trained,
    folder: Path,
    settings: dict[str, Any],
    *,
    base: str,
    by: str = "train",
    sources: Iterable[str | Path] = (),
    later: Iterable[str] = (),
) -> None:
    """Write the trained weights of a run, with the tokenizer and the settings to use them.

    A LoRA run gives a PEFT folder. Full fine-tuning gives a plain Hugging Face folder.

    Args:
        module: trained module.
        folder: folder to write.
        settings: settings of the run.
        base: `base_fingerprint` of the module.
        by: command that writes.
        sources: files and folders that the module was read from.
        later: names of files that are written into the folder afterwards.
    """
    refuse_loss(folder, by=by, sources=sources)
    content = {
        "format": 1,
        "task_state": module.task.state(),
        "base_fingerprint": base,
        "settings": settings,
        "versions": versions(),
    }

    def also(staging: Path) -> None:
        save_tokenizer(module.tokenizer, staging)
        write_checksums(staging, content)

    check_trained(module.trainable_tensors(), hint=f"{folder} was not written.")
    if module.adapter is not None:
        save_adapter(
            module.adapter,
            folder,
            base_model=module.model_config.name_or_path,
            revision=module.model_config.revision,
            task_type=module.task.peft_task_type,
            also=also,
            by=by,
            later=later,
        )
        return
    with replaced_folder(folder, by=by, sources=sources, later=later) as staging:
        module.model.save_pretrained(staging)  # type: ignore[operator]
        also(staging)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer, with compact JSON, which is a third smaller.

    The truncation and padding of the last text are left out, because transformers sets them with
    each text. They also depend on whether this process tokenized the rows or read them from the
    cache.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        content |= {"truncation": None, "padding": None}
        path.write_text(
            json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8"
        )


def refuse_run(output: Path) -> None:
    """Raise UserError if a run has, or will have, files of its own at an output path."""
    output = Path(os.path.realpath(output))  # realpath accepts a cycle of links
    for run_dir in output.parents:
        entry = output.relative_to(run_dir).parts[0]
        is_run = (run_dir / RESULT).is_file() or (run_dir / HYDRA).is_dir()
        if is_run and entry in OWN_ENTRIES:
            raise UserError(
                f"{output} lies in the run {run_dir}, which keeps its own files there: give "
                "another place."
            )


def belongs_to_quantised(folder: Path) -> str | None:
    """Return the base quantization that an adapter compensates for (LoftQ); None: any base fits."""
    if not (folder / SIDECAR).is_file():
        return None
    settings = read_sidecar(folder)["settings"]
    kind = settings["model"].get("quantization")
    return str(kind) if settings["lora"].get("init") == "loftq" else None


def refuse_quantised(folder: Path, *, on: str | None = None) -> None:
    """Raise UserError if an adapter compensates for a quantization that its base will not have.

    Args:
        folder: adapter folder.
        on: quantization of the base that the adapter is to be used on.
    """
    kind = belongs_to_quantised(folder)
    if kind != on and kind is not None:
        raise UserError(
            f"adapter {folder} makes up for what model.quantization={kind} took away "
            "(lora.init=loftq), and means another thing on another base: keep that setting, or "
            f"merge it: {command('merge', adapter=folder, output='DIR')}."
        )


def damaged(folder: Path, error: Exception) -> UserError:
    """Return the error for a damaged file of ours in an adapter folder."""
    return UserError(f"{folder / SIDECAR} is damaged: {error!r}. Copy the adapter again.")


def read_sidecar(folder: Path) -> dict[str, Any]:
    """Return the content of our settings file in an adapter folder.

    Raises:
        UserError: the folder or the file is absent or broken.
    """
    if folder.is_file() and folder.suffix == ".ckpt":
        again = command("import", source=folder, output="DIR")
        raise UserError(
            f"adapter={folder} is a checkpoint of a run. An adapter is made of it by: {again}"
        )
    if not folder.is_dir():
        raise UserError(
            f"adapter={folder}: there is no such folder. A run leaves its adapter in <run>/adapter."
        )
    path = folder / SIDECAR
    if not path.is_file():
        inside = folder / "adapter" / SIDECAR
        hint = f" Did you mean adapter={inside.parent}?" if inside.is_file() else ""
        raise UserError(
            f"adapter={folder} holds no {SIDECAR}, so it was not made by lora-lightning.{hint} "
            "A PEFT adapter of another tool loads in Python: lora_lightning.load_adapter."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        groups = [content["settings"][group] for group in ("model", "task", "lora", "data")]
        if not all(isinstance(part, dict) for part in (*groups, content["task_state"])):
            raise TypeError("settings and task_state must be objects")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(folder, error) from None
    check_content(content, path)
    check_task_state(content["task_state"], path)
    return {**content, "settings": settings_from_file(content["settings"], path)}


@contextmanager
def undone_on_mistake(run_dir: Path, *, always: bool = False) -> Iterator[None]:
    """Lock a run's folder, and remove its new files if the block ends in a mistake of the user.

    Files that existed before stay. New files also stay if the run has reached a checkpoint, or a
    step whose rows it has saved.

    Args:
        run_dir: folder of the run. It and its parents are removed again if the block made them.
        always: remove the new files however the block ends.

    Raises:
        UserError: the folder cannot be written, or another process works in it.
    """
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    undo = always
    try:
        writable(run_dir)
        first = not (run_dir / LOCK).exists()
        with locked(run_dir, setting="output_dir"):
            new = [path for path in (run_dir / name for name in RUN_ENTRIES) if not path.exists()]
            new += [run_dir / LOCK] if first else []
            try:
                yield
            except UserError:
                trained = any((run_dir / "checkpoints").glob("*")) or (run_dir / BAD_STEP).exists()
                undo = always or not trained
                raise
            finally:  # clean up under the lock, before another process begins here
                for path in new if undo else ():
                    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    finally:
        for folder in made:
            with suppress(OSError):  # the folder is not empty
                folder.rmdir()


def writable(run_dir: Path) -> None:
    """Make the folder, and check that a checkpoint will fit.

    Raises:
        UserError: the folder cannot be written, or the disk is nearly full.
    """
    try:
        made_folder(run_dir)
        probe, path = tempfile.mkstemp(prefix=".writable-", dir=run_dir)  # follows no link
        os.close(probe)
        os.unlink(path)
        free = shutil.disk_usage(run_dir).free
    except OSError as error:
        raise UserError(f"output_dir={run_dir} cannot be written: {error}.") from None
    if free < 2**26:
        raise UserError(
            f"output_dir={run_dir}: only {free / 2**20:.0f} MiB are free on its disk, too little "
            "for checkpoints. Free some space or give another output_dir."
        )


def base_fingerprint(module: Trained) -> str:
    """Return a fingerprint that distinguishes the frozen base from others of the same shape.

    Rows that the base has grown by do not change it. It is "" if all parameters are trained, or if
    the base is quantized, which changes its weights.
    """
    if module.adapter is None or module.model_config.quantization is not None:
        return ""
    trained = {id(tensor) for tensor in module.trainable_tensors().values()}
    shorter = before_growth(module.model)
    return fingerprint(
        (name.replace(".base_layer.", "."), shorter.get(parameter, parameter))
        for name, parameter in module.model.named_parameters()
        if id(parameter) not in trained
    )


def versions() -> dict[str, str]:
    """Return the versions of the software that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("lora_lightning", *PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB: of the GPU if training ran on one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def folder_bytes(folder: Path) -> int:
    """Return the total size of the files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
