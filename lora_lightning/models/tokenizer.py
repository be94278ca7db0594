"""Loading of tokenizers, new tokens in tokenizer and model, and a check for unknown tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_lightning.config.schema import ModelConfig
from lora_lightning.errors import UserError
from lora_lightning.lora.embeddings import grow

from .resolve import reported_failure, resolve

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the model's tokenizer with a padding token and with `config.new_tokens`.

    A tokenizer without a padding token uses EOS. This package masks padding by position, never by
    token id, so an EOS in the text keeps its meaning.
    """
    from transformers import AutoTokenizer

    name = config.tokenizer or config.name_or_path
    with reported_failure(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve(
                name,
                option="model.tokenizer" if config.tokenizer else "model.tokenizer (not given)",
                markers=TOKENIZER_FILES,
            ),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    if tokenizer.pad_token_id is None:
        stand_in = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
        if stand_in is None:
            raise UserError(
                f"model.tokenizer={name}: has no token that can pad a batch. Choose another."
            )
        tokenizer.pad_token = stand_in
    add_tokens(tokenizer, config.new_tokens)
    return tokenizer


def add_tokens(tokenizer: Any, tokens: list[str]) -> None:
    """Add tokens to a tokenizer, in their order.

    The tokenizer matches them verbatim, without normalization. They are not special tokens, so
    generated text keeps them.

    Raises:
        UserError: If the tokenizer already has one of them.
    """
    known = tokenizer.get_vocab()
    present = [token for token in tokens if token in known]
    if present:
        raise UserError(
            f"model.new_tokens: the tokenizer already has {_listed(present)}. Leave them out, or "
            f"train their rows: lora.trainable_token_indices=[{known[present[0]]}]."
        )
    if tokens:
        from transformers import AddedToken

        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])


def token_ids(tokenizer: Any, tokens: list[str]) -> list[int]:
    """Return the ids of added tokens, in their order."""
    return [int(number) for number in tokenizer.convert_tokens_to_ids(tokens)]


def grow_embeddings(model: nn.Module, tokenizer: Any) -> None:
    """Grow a model's embeddings and output layer until every token has a row."""
    grow(model, 1 + max(tokenizer.get_vocab().values()))


def embedding_rows(model_config: Any) -> int | None:
    """Return the number of embedding rows in a model's transformers config, or None if absent."""
    rows = getattr(model_config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def check_tokens_known(ids: Iterable[int], rows: int, tokenizer: Any, *, where: str) -> None:
    """Check that every token of a text has a row in the embeddings.

    A tokenizer may know more tokens than its model, like the tokenizer of Gemma 3. This is allowed
    as long as no text contains such tokens.

    Raises:
        UserError: If a token has no row.
    """
    highest = max(ids, default=0)
    if highest < rows:
        return
    token = tokenizer.convert_ids_to_tokens(highest)
    extra = sorted((number, name) for name, number in tokenizer.get_vocab().items())[rows:]
    raise UserError(
        f"{where}: holds the token {token!r}, id {highest}, but the model has {rows} embeddings. "
        f"The tokenizer has more tokens ({_listed([name for _, name in extra])}): leave out "
        "model.tokenizer, and add them with model.new_tokens=[...]."
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
