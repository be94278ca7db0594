"""Bag-of-words logistic regression on the embedded reviews: how separable is the set by words?

Run from the repository's root:  python experiments/reviews/bag_of_words.py
The regularisation is chosen on the validation split; test is looked at once per vectoriser.
"""

from __future__ import annotations

import json
from pathlib import Path

from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression

FOLDER = Path(__file__).parents[2] / "lora_lightning" / "data" / "embedded" / "reviews"


def read(split: str) -> tuple[list[str], list[str]]:
    rows = [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def main() -> None:
    train, val, test = read("train"), read("val"), read("test")
    for name, vectoriser in (
        ("word counts", CountVectorizer()),
        ("tf-idf of words and pairs", TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)),
    ):
        features = vectoriser.fit_transform(train[0])

        def fit(strength: float, features=features) -> LogisticRegression:
            return LogisticRegression(C=strength, max_iter=5000).fit(features, train[1])

        def score(model: LogisticRegression, split, vectoriser=vectoriser) -> float:
            return float(model.score(vectoriser.transform(split[0]), split[1]))

        best = max((0.01, 0.1, 1.0, 10.0, 100.0), key=lambda c: score(fit(c), val))
        print(f"{name:<28} C={best:<6} test accuracy {score(fit(best), test):.4f}")


if __name__ == "__main__":
    main()
