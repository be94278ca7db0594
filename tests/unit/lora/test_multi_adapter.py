"""Several adapters on one base: each row as its own adapter alone would have it."""

from __future__ import annotations

from zlib import crc32

import pytest
import torch

from helpers.architectures import ARCHITECTURES, CAUSAL, case
from helpers.models import randomise
from lora_lightning.lora import (
    AdapterSet,
    UserError,
    load_adapter,
    save_adapter,
)

SETTINGS = {
    "small": {"rank": 1, "alpha": 3},
    "large": {"rank": 5, "alpha": 4, "use_rslora": True},
    "dora": {"rank": 2, "use_dora": True},
}


def stored(this, folder, **settings):
    adapter = this.adapter(**settings)
    randomise(adapter.named_tensors(), seed=crc32(str(sorted(settings.items())).encode()))
    return save_adapter(adapter, folder)


def rows_of(inputs, index):
    return {name: tensor[index] for name, tensor in inputs.items()}


def longer(this, count=6):
    """The case's inputs, as many rows as are asked for, which differ."""
    return {
        name: torch.cat([tensor.roll(shift, -1) for shift in range(count)])[:count]
        for name, tensor in this.inputs.items()
    }


MIXING = ("deberta", "deberta-v2")  # positions, which no row owns, go through adapted layers


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in MIXING])
def test_adapter_set_forward_uses_each_rows_adapter(name, tmp_path):
    """Rows in any order and number, some without one: each as by its adapter alone."""
    this = case(name)
    adapters = AdapterSet(this.copy())
    for key, settings in SETTINGS.items():
        adapters.add(key, stored(this, tmp_path / key, **settings))
    inputs = longer(this)
    names = ["large", None, "small", "large", "dora", "large"]
    together = adapters(names, **inputs).logits
    for row, key in enumerate(names):
        one = this.copy() if key is None else load_adapter(this.copy(), tmp_path / key).model
        with torch.no_grad():
            expected = one.eval()(**rows_of(inputs, slice(row, row + 1))).logits[0]
        torch.testing.assert_close(together[row], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[3]) or torch.equal(
        *(inputs["input_ids"][row] for row in (0, 3))
    )


@pytest.mark.parametrize("name", MIXING)
def test_adapter_set_of_a_model_that_mixes_rows_raises(name, tmp_path):
    this = case(name)
    adapters = AdapterSet(this.copy())
    adapters.add("small", stored(this, tmp_path / "small", **SETTINGS["small"]))
    with pytest.raises(UserError, match="mixes rows: .* one adapter at a time"):
        adapters(["small", None], **longer(this, 2))
    adapters(["small", "small", "small"], **longer(this, 3))


def test_adapter_set_with_too_few_names_raises(tmp_path):
    this = case("llama")
    adapters = AdapterSet(this.copy())
    adapters.add("small", stored(this, tmp_path / "small", **SETTINGS["small"]))
    with pytest.raises(UserError, match="2 adapter names for 3 rows: must be one per row"):
        adapters(["small", None], **longer(this, 3))


def test_adapter_set_forward_computes_one_base_pass(tmp_path):
    """A frozen layer is computed once for all rows, whoever's they are."""
    this = case("llama")
    adapters = AdapterSet(this.copy())
    for key in ("small", "large"):
        adapters.add(key, stored(this, tmp_path / key, **SETTINGS[key]))
    seen = []
    adapters.base.model.norm.register_forward_hook(lambda m, i, o: seen.append(o.shape[0]))
    adapters.add("dora", stored(this, tmp_path / "dora", **SETTINGS["dora"]))
    adapters(["small", "large", "small", "small"], **longer(this, 4))
    assert seen == [4]


def test_adapter_set_shares_weights_and_isolates_adapters(tmp_path):
    this = case("bert")
    adapters = AdapterSet(this.copy())
    before = {key: value.clone() for key, value in adapters.base.state_dict().items()}
    for key in ("small", "large"):
        adapters.add(key, stored(this, tmp_path / key, **SETTINGS[key]))
    one, two = adapters["small"], adapters["large"]
    shared = one.bert.encoder.layer[0].attention.self.query.base_layer.weight
    assert shared is two.bert.encoder.layer[0].attention.self.query.base_layer.weight
    assert shared is adapters.base.bert.encoder.layer[0].attention.self.query.weight
    assert one.classifier.weight is not two.classifier.weight
    kept = this.logits(one)
    adapters.add("large", stored(this, tmp_path / "other", rank=3, bias="all"))  # swapped
    adapters.remove("large")
    assert torch.equal(this.logits(adapters["small"]), kept)
    after = adapters.base.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    with pytest.raises(UserError, match=r"adapter 'smal' not found. Did you mean 'small'"):
        adapters(["smal"], **longer(this, 1))
    with pytest.raises(UserError, match="does not exist"):
        adapters.add("small", tmp_path / "none")
    assert torch.equal(this.logits(adapters["small"]), kept)


@pytest.mark.parametrize("name", [n for n in ("llama", "gpt2") if ARCHITECTURES[n][0] == CAUSAL])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_adapter_set_generate_equals_each_adapter_alone(name, options, tmp_path):
    this = case(name)
    adapters = AdapterSet(this.copy())
    for key in ("small", "large"):
        adapters.add(key, stored(this, tmp_path / key, **SETTINGS[key]))
    ids = longer(this, 5)["input_ids"].clamp_min(3)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    names = ["large", "small", None, "small", "large"]
    mask = torch.ones_like(ids)
    together = adapters.generate(names, input_ids=ids, attention_mask=mask, **settings, **options)
    each = len(together) // len(ids)
    for row, key in enumerate(names):
        part = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        alone = adapters[key].generate(**part, **settings, **options)
        assert torch.equal(together[row * each : (row + 1) * each], alone)
