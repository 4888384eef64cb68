"""The Python blocks of README.md that read and write files, run as they stand there."""

import re

import pandas as pd
from conftest import ROOT, train
from tiny_imdb import make_reviews


def block(part):
    """The one Python block of README.md that contains `part`."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    (found,) = [code for code in blocks if part in code]
    return found


def test_block_that_reads_other_files_loses_and_shifts_no_text(tmp_path, monkeypatch):
    """Stray quotes, codes, and lines with more fields than the first."""
    rows = [("a film", "1"), ('"so dull', "0"), ("NA", "01"), ('so "fine"', "1"), ('"', "NA"), ("no agreement", "-")]
    rows += [('so fine"', "1"), ("a plot, and so on", "0")]
    more = ["", "", "\tmore", "", "\tmore\tand more", "\tmore", "\t", ""]
    lines = [f"{text}\t{label}{extra}\n" for (text, label), extra in zip(rows, more, strict=True)]
    (tmp_path / "raw.tsv").write_text("".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(block('read_csv("raw.tsv"'), {})
    table = pd.read_csv("train.csv", dtype=str, keep_default_na=False)
    assert table.columns.tolist() == ["text", "label"]
    assert list(table.itertuples(index=False, name=None)) == [row for row in rows if row[1] != "-"]


def test_block_that_uses_the_model_gives_its_true_accuracy(tmp_path, monkeypatch, argv):
    """Of classes that the file spells 5.0 and " up", and the run calls 5 and up."""
    spelled = {"5": "5.0", "up": " up"}
    reviews = make_reviews(200, seed=3).shuffle(3)
    labels = [("5", "up")[label] for label in reviews["label"]]
    table = pd.DataFrame({"review": reviews["text"][:], "stars": [spelled[label] for label in labels]})
    monkeypatch.chdir(tmp_path)
    table[:160].to_csv("reviews.csv", index=False)
    table[160:].to_csv("new.csv", index=False)
    flags = ["--train_file", "reviews.csv", "--text_column", "review", "--label_column", "stars"]
    flags += ["--validation_fraction", "0.1", "--learning_rate", "3e-3", "--num_train_epochs", "3"]
    train(tmp_path, *argv, *flags, "--output_dir", "results_reviews")
    namespace = {}
    exec(block('pipeline("text-classification"'), namespace)
    classified = pd.read_csv("classified.csv", dtype=str)
    assert classified["review"].tolist() == table["review"][160:].tolist()
    right = sum(a == b for a, b in zip(classified["predicted_label"], labels[160:], strict=True))
    assert set(classified["predicted_label"]) <= {"5", "up"} and right > 10
    assert namespace["report"]["accuracy"] == right / 40
