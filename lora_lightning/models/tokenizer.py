"""New tokens in a tokenizer, their embedding rows in the model, and a check for unknown tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_lightning.errors import UserError
from lora_lightning.lora.embeddings import grow


def add_tokens(tokenizer: Any, tokens: list[str]) -> None:
    """Add tokens to a tokenizer, in their order.

    The tokenizer matches them verbatim, without normalization. They are not special tokens, so
    generated text keeps them.

    Raises:
        UserError: If the tokenizer already has one of them.
    """
    known = tokenizer.get_vocab()
    there = [token for token in tokens if token in known]
    if there:
        raise UserError(
            f"model.new_tokens: the tokenizer has {_listed(there)} already. Leave out what is no "
            "new token; rows of known tokens are trained with lora.trainable_token_indices="
            f"[{known[there[0]]}]."
        )
    if tokens:
        from transformers import AddedToken

        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])


def token_ids(tokenizer: Any, tokens: list[str]) -> list[int]:
    """Return the ids of added tokens, in their order."""
    return [int(number) for number in tokenizer.convert_tokens_to_ids(tokens)]


def make_room(model: nn.Module, tokenizer: Any) -> None:
    """Grow a model's embeddings and output layer until every token has a row."""
    grow(model, 1 + max(tokenizer.get_vocab().values()))


def rows_in(model_config: Any) -> int | None:
    """Return the number of embedding rows in a model's transformers config, or None if absent."""
    rows = getattr(model_config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def refuse_unknown(ids: Iterable[int], rows: int, tokenizer: Any, *, where: str) -> None:
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
        f"{where} holds the token {token!r}, id {highest}, and the model has embeddings for "
        f"{rows} tokens: the tokenizer knows more, {_listed([name for _, name in extra])}. Take "
        "the model's own tokenizer (leave out model.tokenizer), and let the run add tokens and "
        "train them: model.new_tokens=[...]."
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
