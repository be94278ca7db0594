"""Classification: labels of every kind, pooling, loss and metrics."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from helpers.data import make_rows
from lora_lightning.config.compose import compose_config
from lora_lightning.config.schema import ModelConfig, SentimentConfig
from lora_lightning.data.collators import PaddingCollator
from lora_lightning.errors import UserError
from lora_lightning.models.forward import classification_logits
from lora_lightning.models.loading import load_classifier
from lora_lightning.models.model_config import load_model_config
from lora_lightning.models.tokenizer import load_tokenizer
from lora_lightning.tasks import (
    IGNORE,
    LossOutput,
    SentimentTask,
    build_task,
)
from lora_lightning.training.run import train
from lora_lightning.training.warm_start import task_state_of

SEVEN = ["anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise"]


def _learn(values, *, features=None, **settings) -> tuple[SentimentTask, Dataset]:
    rows = Dataset.from_dict(
        {"text": [f"text {i}" for i in range(len(values))], "label": values}, features=features
    )
    task = SentimentTask(SentimentConfig(**settings))
    task.learn({"train": rows})
    return task, rows


# Labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "labels", "ids"),
    [
        (["neg", "pos", "neg"], ["neg", "pos"], [0, 1, 0]),
        ([" pos ", "neg", "pos"], ["neg", "pos"], [1, 0, 1]),
        ([1, 0, 1], ["0", "1"], [1, 0, 1]),
        ([3, 1, 5, 2, 4], ["1", "2", "3", "4", "5"], [2, 0, 4, 1, 3]),
        ([-1, 1, 0], ["-1", "0", "1"], [0, 2, 1]),
        ([True, False, True], ["false", "true"], [1, 0, 1]),
        ([1.0, 0.0], ["0.0", "1.0"], [1, 0]),
        (["01", "00", "10", "9"], ["00", "01", "9", "10"], [1, 0, 3, 2]),
        (["1", "0.10", "0.1"], ["0.1", "0.10", "1"], [2, 1, 0]),
        ([0.5, 4.5, 0.5], ["0.5", "4.5"], [0, 1, 0]),
        (["1", "0"], ["0", "1"], [1, 0]),
        ([10, 9, 100], ["9", "10", "100"], [1, 0, 2]),
        (SEVEN[::-1], SEVEN, [6, 5, 4, 3, 2, 1, 0]),
    ],
    ids=[
        "names",
        "blanks",
        "numbers",
        "stars",
        "signed",
        "booleans",
        "floats",
        "zeros",
        "decimals",
        "halves",
        "digits",
        "order",
        "seven",
    ],
)
def test_labels_of_every_kind(values, labels, ids):
    task, _ = _learn(values)
    assert task.labels == labels
    assert [task.label_id(value) for value in values] == ids


def test_class_label_features_keep_their_order():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
    task, rows = _learn([0, 1, 1], features=features)
    assert task.labels == ["pos", "neg"]
    assert [task.label_id(value) for value in rows["label"]] == [0, 1, 1]


def test_explicit_order_takes_names_and_ids():
    task, _ = _learn(["bad", "good"], labels=["good", "fair", "bad"])
    assert task.labels == ["good", "fair", "bad"]
    assert [task.label_id(value) for value in ("good", "fair", "bad")] == [0, 1, 2]
    task, _ = _learn([0, 2, 1], labels=["bad", "fair", "good"])
    assert [task.label_id(value) for value in (0, 1, 2, "2", "good")] == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("order", [["True", "False"], ["true", "false"], ["false", "true"]])
def test_names_of_truth_values_are_in_the_order_that_is_typed(order):
    task, rows = _learn([True, False, True], labels=order)
    assert task.labels == order
    places = [order.index(name) for name in order if name.lower() == "true"]
    assert [task.label_id(value) for value in rows["label"]] == [*places, 1 - places[0], *places]


def test_typed_truth_values_are_names(tmp_path):
    config = compose_config(["task.labels=[true,false]"])
    task, _ = _learn(["True", "False"], labels=list(config.task.labels))
    assert [task.label_id(value) for value in ("True", "False")] == [0, 1]


@pytest.mark.parametrize("value", [["a", "b"], {"a": 1}])
def test_a_text_that_is_none_is_refused(value):
    rows = Dataset.from_dict({"text": [value, value], "label": ["a", "b"]})
    with pytest.raises(UserError, match="the train data, row 1, column 'text': must hold text"):
        SentimentTask().learn({"train": rows})


def test_other_splits_may_say_the_same_in_another_type():
    task = SentimentTask()
    train = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    task.learn({"train": train, "val": Dataset.from_dict({"text": ["c"], "label": ["1"]})})
    assert task.label_id("1") == 1


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        (["pos", "neg", "meh"], {"labels": ["pos", "neg"]}, "unknown label 'meh' in row 3"),
        (["pos", None, "neg"], {}, "1 of 3 rows have no label, first row 2"),
        (["pos", "pos"], {}, "only 'pos'"),
        (["pos", "neg"], {"labels": ["pos", "neg", "pos"]}, "names a class twice"),
        (["pos", "neg"], {"label_column": "lable"}, "Did you mean 'label'"),
        ([f"label {i}" for i in range(80)], {}, "too many for a class label"),
        ([3, 1], {"labels": ["a", "b"]}, "unknown label 3 in row 1"),
        ([1.0, 0.0], {"labels": ["1", "0"]}, "unknown label 1.0 in row 1"),
        ([1.0, 0.0], {"labels": ["a", "b"]}, "unknown label 1.0 in row 1"),
        (["01", "00"], {"labels": ["1", "0"]}, "unknown label '01' in row 1"),
        (["01", "00"], {"labels": ["a", "b"]}, "unknown label '01' in row 1"),
        (["true", "false"], {"labels": ["True", "False"]}, "unknown label 'true' .* 'True'"),
        ([True, False], {"labels": ["a", "b"]}, "unknown label 'true' in row 1"),
        ([0, 1], {"labels": ["1", "2", "3"]}, "unknown label 0 in row 1"),
    ],
)
def test_wrong_labels_are_told(values, settings, message):
    with pytest.raises(UserError, match=message):
        _learn(values, **settings)


def test_state_restores_labels_and_columns():
    task, _ = _learn([3, 1, 2])
    other = build_task({"name": "sentiment"})
    other.restore(copy.deepcopy(task.state()))
    assert other.state() == task.state()
    assert [other.label_id(value) for value in (1, 2, 3)] == [0, 1, 2]
    assert other.label_id(0) is None


# Rows to examples --------------------------------------------------------------------------------


def test_text_pairs_are_encoded_as_the_tokenizer_does(tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    rows = Dataset.from_dict(
        {"premise": ["the film was good"], "claim": ["bad film"], "label": ["no"]}
    )
    rows = Dataset.from_list([*rows, {**rows[0], "label": "yes"}])
    task = SentimentTask(SentimentConfig(text_column="premise", text_pair_column="claim"))
    task.learn({"train": rows})
    encoded = task.encode(rows[:], tokenizer, 64)
    expected = tokenizer("the film was good", "bad film")
    assert encoded["input_ids"][0] == expected["input_ids"]
    assert encoded["token_type_ids"][0] == expected["token_type_ids"]
    assert set(encoded["token_type_ids"][0]) == {0, 1}
    assert encoded["labels"] == [0, 1]
    assert task.input_columns() == ["premise", "claim"]


def test_prediction_rows_need_no_label(tiny_bert):
    task, _ = _learn(["neg", "pos"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    encoded = task.encode({"text": ["good film", ""]}, tokenizer, 64, targets=False)
    assert "labels" not in encoded
    assert encoded["input_ids"][1] == []


# Model and loss ----------------------------------------------------------------------------------

TEXTS = [
    "the film was lovely",
    "bad",
    "service slow and food cold , never again",
    "not good but not bad",
]


def _batch(tokenizer, texts, labels=None, **kwargs):
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]
    if "token_type_ids" in tokenizer(texts[0]):
        for row, text in zip(rows, texts, strict=True):
            row["token_type_ids"] = tokenizer(text)["token_type_ids"]
    for row, label in zip(rows, labels or [], strict=False):
        row["labels"] = label
    return PaddingCollator(tokenizer.pad_token_id, **kwargs)(rows)


def _model(folder, labels):
    config = ModelConfig(name_or_path=str(folder))
    tokenizer = load_tokenizer(config)
    torch.manual_seed(0)
    model, whole = load_classifier(config, tokenizer, labels)
    return model, tokenizer, whole


def test_class_names_are_in_the_models_config_and_the_head_is_trained(tiny_bert):
    model, _, whole = _model(tiny_bert, SEVEN)
    assert model.config.id2label == dict(enumerate(SEVEN))
    assert model.config.label2id["joy"] == 3
    assert model.training
    assert all(module.training for module in model.modules())
    assert "classifier" in whole


@pytest.mark.parametrize("ignored", [[], [2]])
def test_encoder_loss_is_the_models_own(tiny_bert, ignored):
    model, tokenizer, _ = _model(tiny_bert, ["neg", "meh", "pos"])
    model.eval()
    labels = [IGNORE if i in ignored else label for i, label in enumerate([0, 2, 1, 2])]
    batch = _batch(tokenizer, TEXTS, labels)
    task, _ = _learn(["neg", "meh", "pos"], labels=["neg", "meh", "pos"])
    output = task.loss(model, batch)
    own = model(**batch)
    torch.testing.assert_close(output.outputs, own.logits)
    torch.testing.assert_close(output.total / output.count, own.loss)
    assert output.count == 4 - len(ignored)


def test_no_target_gives_a_zero_loss_with_a_graph(tiny_bert):
    model, tokenizer, _ = _model(tiny_bert, ["neg", "pos"])
    task, _ = _learn(["neg", "pos"])
    output = task.loss(model, _batch(tokenizer, TEXTS[:1], [IGNORE]))
    output.total.backward()
    assert output.total == 0
    assert output.count == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("side", ["right", "left"])
def test_decoder_pooling_is_transformers_own_where_padding_is_no_content(tiny_llama, side):
    model, tokenizer, _ = _model(tiny_llama, ["neg", "pos"])
    tokenizer.pad_token = "<unk>"
    model.config.pad_token_id = tokenizer.pad_token_id
    model.eval()
    batch = _batch(tokenizer, TEXTS, padding_side=side)
    with torch.no_grad():
        torch.testing.assert_close(classification_logits(model, batch), model(**batch).logits)


@pytest.mark.parametrize("side", ["right", "left"])
def test_decoder_pooling_is_right_where_the_text_ends_with_the_pad_token(tiny_llama, side):
    """The padding token is EOS, and the texts end with it: the truth is a batch of one."""
    model, tokenizer, _ = _model(tiny_llama, ["neg", "pos"])
    model.eval()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    texts = ["bad </s>", "the film was lovely </s> </s>", "good", "slow </s> service , cold food"]
    batch = _batch(tokenizer, texts, padding_side=side)
    alone = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            hidden = model.model(input_ids=ids).last_hidden_state
            alone.append(model.score(hidden[:, -1]))
        ours = classification_logits(model, batch)
        theirs = model(**batch).logits
    torch.testing.assert_close(ours, torch.cat(alone), atol=1e-5, rtol=1e-5)
    if side == "right":  # the reason why we pool ourselves
        assert (theirs - ours).abs().max() > 1e-3


# Metrics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_metrics_are_those_of_scikit_learn(classes):
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (203,), generator=generator)
    logits = torch.randn(203, classes, generator=generator)
    logits[torch.arange(203), labels] += 0.7
    logits[0] = logits[1] = logits[2]  # ties
    kept = torch.rand(203, generator=generator) > 0.1
    names = SEVEN[:classes]
    task, _ = _learn(names)
    metrics = task.metrics()
    for start in range(0, 203, 32):
        part = slice(start, start + 32)
        batch = {"labels": labels[part].masked_fill(~kept[part], IGNORE)}
        task.update_metrics(metrics, None, batch, LossOutput(None, None, logits[part]))
    truth, scores = labels[kept].numpy(), logits[kept].softmax(-1).numpy()
    expected = {
        "accuracy": accuracy_score(truth, scores.argmax(-1)),
        "f1": f1_score(truth, scores.argmax(-1), average="macro"),
    }
    if classes == 2:
        expected["auroc"] = roc_auc_score(truth, scores[:, 1])
    found = {name: value.item() for name, value in metrics.compute().items()}
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_batch_without_labels_changes_no_metric():
    task, _ = _learn(["neg", "pos"])
    metrics = task.metrics()
    task.update_metrics(
        metrics,
        None,
        {"labels": torch.tensor([IGNORE])},
        LossOutput(None, None, torch.zeros(1, 2)),
    )
    output = LossOutput(None, None, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    task.update_metrics(metrics, None, {"labels": torch.tensor([1, 1])}, output)
    assert metrics.compute()["accuracy"] == 0.5


def test_predictions_name_the_class_and_sum_to_one():
    task, _ = _learn(SEVEN)
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for row, found in zip(logits, task.predictions(logits), strict=True):
        probabilities = np.exp(row.double().numpy())
        probabilities /= probabilities.sum()
        assert found["label"] == SEVEN[int(row.argmax())]
        assert list(found["scores"].values()) == pytest.approx(probabilities, abs=2e-6)
        assert found["score"] == max(found["scores"].values())


def named(names: list[str], ids: list[int]) -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = {"text": [f"food {i}" for i in range(len(ids))], "label": ids}
    return Dataset.from_dict(rows, features=features)


def test_names_that_are_numbers_are_no_places():
    """Polarities of Yelp and Amazon are called 1 and 2, and numbered 0 and 1."""
    task = SentimentTask()
    task.learn({"train": named(["1", "2"], [0, 1, 1])})
    assert task.labels == ["1", "2"]
    assert [task.label_id(value) for value in (0, 1, "1", "2")] == [0, 1, 0, 1]


def test_splits_that_number_their_classes_otherwise_are_refused():
    task = SentimentTask()
    splits = {"train": named(["neg", "pos"], [0, 1]), "val": named(["pos", "neg"], [0, 1])}
    with pytest.raises(
        UserError, match="the val data: must number its classes as .*numbers them pos, neg"
    ):
        task.learn(splits)
    task = SentimentTask()
    task.learn({"train": splits["train"]})
    with pytest.raises(
        UserError, match="the test data: must number its classes as .*numbers them pos, neg"
    ):
        task.learn({"test": splits["val"]})


# A base that is a classifier already -------------------------------------------------------------


def _classifier(tiny_bert, folder, names):
    """A base whose head is trained, rows whose labels are its own answers, and these as ids."""
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    model = BertForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=len(names), id2label=dict(enumerate(names))
    ).eval()
    texts = [row["text"] for row in make_rows(40, seed=3)]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        model.classifier.weight.mul_(50)
        model.classifier.bias.sub_(model(**batch).logits.mean(0))
        answers = model(**batch).logits.argmax(-1).tolist()
    assert 10 < sum(answers) < 30
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, texts, answers


@pytest.mark.parametrize("spelling", [str, str.lower], ids=["same", "another case"])
def test_a_base_that_is_a_classifier_keeps_its_order(tiny_bert, tmp_path, fast, spelling):
    names = ["POSITIVE", "NEGATIVE"]
    base, texts, answers = _classifier(tiny_bert, tmp_path / "base", names)
    rows = [
        json.dumps({"text": text, "label": spelling(names[answer])})
        for text, answer in zip(texts, answers, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    result = train(
        compose_config(
            [
                *(item for item in fast if not item.startswith("test_before")),
                *(f"model.name_or_path={base}", f"data.train={tmp_path}/rows.jsonl"),
                *("data.test_fraction=0.4", f"output_dir={tmp_path}/run", "optim.lr=1e-7"),
            ]
        )
    )
    assert result["before"]["test/accuracy"] == result["test/accuracy"] == 1.0
    config = json.loads((tmp_path / "run/adapter/lora_lightning.json").read_text())
    assert config["task_state"]["labels"] == [spelling(name) for name in names]


@pytest.mark.parametrize(
    ("names", "values", "typed", "labels", "kept"),
    [
        (["b", "a"], ["a", "b"], None, ["b", "a"], True),
        (["b", "a"], ["x", "y"], None, ["x", "y"], False),
        (["b", "a"], ["x", "y"], ["y", "x"], ["y", "x"], False),
        (["LABEL_0", "LABEL_1"], ["x", "y"], None, ["x", "y"], False),
        (["LABEL_0", "LABEL_1"], ["x", "y"], ["y", "x"], ["y", "x"], True),
        (["LABEL_0", "LABEL_1"], [1, 0], None, ["0", "1"], True),
        (["c", "b", "a"], ["a", "b"], None, ["a", "b"], False),
    ],
)
def test_the_head_of_a_base_is_kept_for_its_own_classes(
    tiny_bert, tmp_path, names, values, typed, labels, kept
):
    base = BertForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=len(names), id2label=dict(enumerate(names))
    )
    base.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    model = ModelConfig(name_or_path=str(tmp_path))
    task = SentimentTask(SentimentConfig(labels=typed))
    task.prepare(load_model_config(model))
    task.learn({"train": Dataset.from_dict({"text": ["t", "u"], "label": values})})
    built, trained = task.build_model(model, load_tokenizer(model))
    assert task.labels == labels
    assert built.config.id2label == dict(enumerate(labels))
    assert "classifier" in trained
    same = built.classifier.weight.shape == base.classifier.weight.shape
    assert kept == (same and torch.equal(built.classifier.weight, base.classifier.weight))
    for name, tensor in base.bert.state_dict().items():
        assert torch.equal(tensor, built.bert.state_dict()[name])
    told = " ".join(task.notes)
    assert ("Training begins with a new head" in told) == (not kept and len(names) == 2)


def test_another_order_than_that_of_the_head_is_refused():
    task = SentimentTask(SentimentConfig(labels=["a", "b"]))
    task.prepare(
        BertConfig(architectures=["BertForSequenceClassification"], id2label={0: "b", 1: "a"})
    )
    rows = Dataset.from_dict({"text": ["t", "u"], "label": ["a", "b"]})
    with pytest.raises(UserError, match=r"task.labels=\[a,b\]: must have the order .*\[b,a\]"):
        task.learn({"train": rows})


def test_numbers_of_a_data_set_are_taken_for_the_names_of_the_base():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = Dataset.from_dict({"text": ["t", "u"], "label": [0, 1]}, features=features)
    task = SentimentTask()
    task.prepare(
        BertConfig(architectures=["BertForSequenceClassification"], id2label={0: "pos", 1: "neg"})
    )
    task.learn({"train": rows})
    assert task.labels == ["pos", "neg"]
    assert [task.label_id(value) for value in rows["label"]] == [1, 0]


@pytest.mark.parametrize(
    ("values", "typed", "labels"),
    [
        (["a", "b"], None, ["b", "a"]),
        (["x", "y"], None, None),
        (["x", "y"], ["y", "x"], ["y", "x"]),
    ],
)
def test_an_adapter_to_start_from_keeps_its_order(values, typed, labels):
    task = SentimentTask(SentimentConfig(labels=typed))
    task.begin_with({"labels": ["b", "a"]}, "old/adapter")
    rows = Dataset.from_dict({"text": ["t", "u"], "label": values})
    if labels is None:
        with pytest.raises(UserError, match="adapter=old/adapter: has the classes b, a"):
            task.learn({"train": rows})
        return
    task.learn({"train": rows})
    assert task.labels == labels


def test_the_state_of_a_task_is_read_of_adapters_and_checkpoints(tmp_path):
    state = {"labels": ["b", "a"]}
    (tmp_path / "lora_lightning.json").write_text(json.dumps({"task_state": state}))
    assert task_state_of(str(tmp_path)) == state
    assert task_state_of(str(tmp_path / "none")) == {}
