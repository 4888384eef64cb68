"""Data as people have them: their files, splits, labels and pairs; what cannot be trained on ends in one line."""

import ast
import json
import re

import datasets
import numpy as np
import pandas as pd
import pytest
import transformers
from conftest import Run
from datasets import ClassLabel, Dataset, Features, Value
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from tiny_imdb import NEUTRAL, OPINION, make_reviews
from transformers import AutoTokenizer, pipeline

import train_rdrop
from train_rdrop import UserError, load_splits, parse_args

GOOD = ["a fine film,1", "a dull film,0", "so fine,1", "so dull,0"]


@pytest.fixture
def load(argv):
    """`load(*flags)`: the splits that a run with these flags trains and evaluates on."""

    def load(*flags):
        args = parse_args([str(flag) for flag in [*argv, "--report_to", "none", *flags]])
        return load_splits(args, args.seed)

    return load


def sizes(splits):
    return {split: len(rows) for split, rows in splits.items()}


def write_csv(file, lines, header="text,label"):
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join([header, *lines]) + "\n")
    return file


def write_split(folder, split, rows, names=("neg", "pos"), columns=("text",)):
    """A split as the Hub holds it: `rows` of texts and a class id, -1 where there is no label."""
    features = Features({column: Value("string") for column in columns} | {"label": ClassLabel(names=list(names))})
    columns = dict(zip(features, zip(*rows, strict=True), strict=True))
    (folder / "data").mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, features).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


# ----------------------------------------------------------------------------------------------------------- files
TABLE = {
    "review": ["a fine film", 'so "fine", she\tsaid', "très bien, 很好", "NA", "dull\nand long", "so dull"],
    "stars": ["good", "good", "good", "NA", "None", "None"],
}
KINDS = {
    "csv": lambda table, file: table.to_csv(file, index=False),
    "tsv": lambda table, file: table.to_csv(file, index=False, sep="\t"),
    "json": lambda table, file: table.to_json(file, orient="records"),
    "jsonl": lambda table, file: table.to_json(file, orient="records", lines=True),
    "parquet": lambda table, file: table.to_parquet(file),
}


@pytest.mark.parametrize("name", [*KINDS, "csv.gz", "tsv.gz", "json.gz", "jsonl.gz"])
def test_file_of_each_kind(load, tmp_path, name):
    file = tmp_path / f"reviews.2024.{name}"
    KINDS[name.removesuffix(".gz")](pd.DataFrame(TABLE), file)
    assert (file.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")
    columns = ("--text_column", "review", "--label_column", "stars")
    splits = load("--train_file", file, "--validation_file", file, "--test_file", file, *columns)
    assert list(splits) == ["train", "validation", "test"]
    for rows in splits.values():
        assert rows["text"][:] == TABLE["review"]
        assert rows.features["labels"].names == ["NA", "None", "good"] and rows["labels"][:] == [2, 2, 2, 0, 1, 1]


@pytest.fixture(scope="module")
def files_run(tmp_path_factory, argv):
    """A run on three files of three kinds, with labels -1 and 1 of which -1 is the positive one, cut to 20 tokens."""
    folder = tmp_path_factory.mktemp("files")
    for name, count, seed in (("train.csv", 192, 5), ("validation.tsv", 40, 6), ("test.jsonl.gz", 50, 7)):
        reviews = make_reviews(count, seed)
        table = pd.DataFrame({"text": reviews["text"][:], "label": [2 * label - 1 for label in reviews["label"][:]]})
        if name == "train.csv":  # a blank label makes floats of all labels
            table.loc[5, "text"], table.loc[9, "label"] = "  ", None
        KINDS[name.split(".")[1]](table, folder / name)
    files = ("--train_file", "train.csv", "--validation_file", "validation.tsv", "--test_file", "test.jsonl.gz")
    flags = ("--positive_label", "-1", "--max_length", "20", "--num_train_epochs", "4")
    pace = ("--per_device_train_batch_size", "8", "--learning_rate", "3e-3")
    run = Run([*argv, *files, *flags, *pace], folder).wait()
    assert run.status == 0, run.err
    return run


def test_files_start_lines_and_summary(files_run):
    lines = files_run.out.splitlines()
    assert [line for line in lines if re.match("(train|validation|test): .* rows", line)] == [
        "train: 190 of 192 rows, {'-1': 94, '1': 96}",
        "validation: 40 of 40 rows, {'-1': 20, '1': 20}",
        "test: 50 of 50 rows, {'-1': 25, '1': 25}",
    ]
    tokenizer = AutoTokenizer.from_pretrained(files_run.folder / "results_rdrop")
    texts = pd.read_csv(files_run.folder / "train.csv").dropna()["text"]
    lengths = [len(tokens) for tokens in tokenizer([text for text in texts if text.strip()])["input_ids"]]
    cut = sum(length > 20 for length in lengths)
    assert f"train: {sum(min(length, 20) for length in lengths)} tokens; {cut} texts are cut to 20" in lines
    figures = files_run.json("all_results.json")
    said = ", ".join(f"{name} {figures['test_' + name]:.4f}" for name in ("accuracy", "f1", "auc", "loss"))
    assert f"test: {said} (F1 and AUC of '-1')" in lines
    assert files_run.err.count("are left out") == 1
    assert "train: 2 of 192 rows without text or label are left out." in files_run.err


def test_validation_file_chooses_and_test_file_is_evaluated_once(files_run):
    history = files_run.json("trainer_state.json")["log_history"]
    evals = [entry["eval_f1"] for entry in history if "eval_f1" in entry]
    assert len(evals) == 5 and evals[-1] == max(evals) == files_run.json("eval_results.json")["eval_f1"]
    assert ["test_f1" in entry for entry in history].count(True) == 1 and "test_f1" in history[-1]


def scores_of(folder, inputs):
    """The score of each class for each of `inputs`, as a user gets them from the saved model: {name: [...]}."""
    answers = pipeline("text-classification", model=str(folder), truncation=True, top_k=None)(inputs)
    answers = [{part["label"]: part["score"] for part in answer} for answer in answers]
    return {name: [answer[name] for answer in answers] for name in answers[0]}


@pytest.mark.parametrize("prefix, file", [("eval", "validation.tsv"), ("test", "test.jsonl.gz")])
def test_pipeline_gives_the_figures_reported(files_run, prefix, file):
    config = files_run.json("config.json")
    assert config["id2label"] == {"0": "-1", "1": "1"} and config["label2id"] == {"-1": 0, "1": 1}
    read = pd.read_json if "json" in file else pd.read_csv
    table = read(files_run.folder / file, **({"lines": True} if "json" in file else {"sep": "\t"}))
    scores = scores_of(files_run.folder / "results_rdrop", table["text"].tolist())
    negative, answers = table["label"] == -1, [a > b for a, b in zip(scores["-1"], scores["1"], strict=True)]
    reported = {name: files_run.json("all_results.json")[f"{prefix}_{name}"] for name in ("accuracy", "f1", "auc")}
    assert reported["accuracy"] == accuracy_score(negative, answers) and 0.5 < reported["accuracy"] < 1
    assert reported["f1"] == pytest.approx(f1_score(negative, answers))
    assert reported["auc"] == pytest.approx(roc_auc_score(negative, scores["-1"]))
    other = f1_score(~negative, [not answer for answer in answers])
    assert reported["f1"] != pytest.approx(other), "else this test would not see which class is meant"


def test_positive_label_that_is_not_one_of_two_classes_is_refused(load, tmp_path, start):
    two = write_csv(tmp_path / "two.csv", GOOD)
    three = write_csv(tmp_path / "three.csv", [*GOOD, "so so,2"])
    for file, label, classes in ((two, "good", "['0', '1']"), (three, "1", "['0', '1', '2']")):
        run = start("--train_file", file, "--test_file", file, "--positive_label", label).wait()
        run.assert_one_line(2, f"--positive_label '{label}' is not one of two: {classes}")
    assert sizes(load("--train_file", two, "--test_file", two, "--positive_label", "0")) == {"train": 4, "test": 4}


# ---------------------------------------------------------------------------------------------------------- splits
SIZES = {"train": 40, "validation": 12, "test": 20, "validation_matched": 14, "validation_mismatched": 16}
ALL = ["train", "validation", "test"]
GLUE = ["train", "validation_matched", "validation_mismatched", "test"]
RULE = [  # splits that there are, flags, splits used: (name here, name there or rows)
    (["train", "validation"], "", {"train": 40, "validation": "validation"}),
    (["train", "test"], "", {"train": 40, "test": "test"}),
    (ALL, "", {"train": 40, "validation": "validation", "test": "test"}),
    (["train"], "--validation_fraction 0.1", {"train": 36, "validation": 4}),
    (["train", "test"], "--validation_fraction 0.1", {"train": 36, "validation": 4, "test": "test"}),
    (ALL, "--validation_split none --validation_fraction 0.25", {"train": 30, "validation": 10, "test": "test"}),
    (ALL, "--validation_split none", {"train": 40, "test": "test"}),
    (ALL, "--test_split none", {"train": 40, "validation": "validation"}),
    (GLUE, "--validation_split validation_matched", {"train": 40, "validation": "validation_matched", "test": "test"}),
    (
        GLUE,
        "--validation_split validation_matched --test_split validation_mismatched",
        {"train": 40, "validation": "validation_matched", "test": "validation_mismatched"},
    ),
]


def write_splits(folder, names):
    """Each split holds texts of its own; beside them IMDB's `unsupervised`, without labels."""
    for split in names:
        write_split(folder, split, [(f"{split} {row}", row % 2) for row in range(SIZES[split])])
    write_split(folder, "unsupervised", [("nobody has read it", -1)] * 8)


@pytest.mark.parametrize("there, flags, used", RULE, ids=[f"{'+'.join(there)} {flags}" for there, flags, _ in RULE])
def test_rule_of_the_splits(load, tmp_path, capsys, caplog, there, flags, used):
    write_splits(tmp_path, there)
    splits = load("--dataset_name", tmp_path, *flags.split())
    assert splits.keys() == used.keys()
    for split, rows in splits.items():
        name = used[split]
        if isinstance(name, str):
            assert rows["text"][:] == [f"{name} {row}" for row in range(SIZES[name])]
        else:
            assert len(rows) == name and all(text.startswith("train ") for text in rows["text"])
    assert "unsupervised" not in capsys.readouterr().out and not caplog.messages


REFUSED = [  # splits that there are, flags, and what the line must say
    (["train"], "", ["no validation or test split", "--validation_fraction 0.1", "--validation_split"]),
    (["train", "validation"], "--validation_split none", ["--validation_fraction 0.1", "--validation_split"]),
    (ALL, "--validation_fraction 0.1", ["a validation split is there", "--validation_fraction"]),
    (["train", "test"], "--validation_split dev", ["has no split 'dev', only: train, test, unsupervised"]),
    (["train", "validation"], "--test_split final", ["has no split 'final', only: train, validation, unsupervised"]),
    (["validation", "test"], "", ["has no split 'train', only: validation, test, unsupervised"]),
]


@pytest.mark.parametrize("there, flags, words", REFUSED)
def test_splits_that_are_refused(load, tmp_path, there, flags, words):
    write_splits(tmp_path, there)
    with pytest.raises(UserError) as error:
        load("--dataset_name", tmp_path, *flags.split())
    assert all(word in str(error.value) for word in words), error.value


def test_configuration_of_a_data_set(load, tmp_path):
    for name, word in (("en", "film"), ("de", "Kino")):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            write_split(tmp_path / name, split, [(f"{word} {row}", row % 2) for row in range(4)])
    configs = [f"- config_name: {name}\n  data_dir: {name}\n" for name in ("en", "de")]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    splits = load("--dataset_name", tmp_path, "--dataset_config_name", "de")
    assert splits["train"]["text"][0] == "Kino 0"
    with pytest.raises(UserError, match="'en', 'de'"):
        load("--dataset_name", tmp_path)


def test_validation_part_is_held_out_stratified_and_drawn_with_the_seed(load):
    whole = load()
    assert list(whole) == ["train", "test"]
    held = load("--validation_fraction", "0.1")
    assert sizes(held) == {"train": 360, "validation": 40, "test": 100}
    assert sum(held["validation"]["labels"]) == 20
    assert sorted(held["train"]["text"][:] + held["validation"]["text"][:]) == sorted(whole["train"]["text"])
    assert held["validation"]["text"][:] == load("--validation_fraction", "0.1")["validation"]["text"][:]
    assert held["validation"]["text"][:] != load("--validation_fraction", "0.1", "--seed", "1")["validation"]["text"][:]


def test_samples_are_drawn_with_the_seed_from_all_labels(load):
    part = load("--max_train_samples", "60", "--max_eval_samples", "50")
    assert len(part["train"]) == 60 and len(part["test"]) == 50
    assert 15 <= sum(part["train"]["labels"]) <= 45, "the first rows are all negative"
    assert part["train"]["text"][:] == load("--max_train_samples", "60")["train"]["text"][:]
    assert part["train"]["text"][:] != load("--max_train_samples", "60", "--seed", "7")["train"]["text"][:]


# ---------------------------------------------------------------------------------------------------------- labels
LABELS = [  # kind of file, labels as it holds them, the names of the classes, the labels as their ids
    ("csv", ["good", "bad", "so so"], ["bad", "good", "so so"], [1, 0, 2]),
    ("csv", [" good", "good ", "bad", "  bad"], ["bad", "good"], [1, 1, 0, 0]),
    ("csv", ["1", "5", "3", "4", "2"], ["1", "2", "3", "4", "5"], [0, 4, 2, 3, 1]),
    ("csv", ["10", "1", "2"], ["1", "2", "10"], [2, 0, 1]),
    ("csv", ["1", "-1"], ["-1", "1"], [1, 0]),
    ("csv", ["4.0", "2.0"], ["2", "4"], [1, 0]),
    ("csv", ["true", "false"], ["false", "true"], [1, 0]),
    ("csv", ["True", "true", "TRUE", "1"], ["1", "TRUE", "True", "true"], [2, 3, 1, 0]),
    ("csv", ["01", "1", "02", "10"], ["01", "1", "02", "10"], [0, 1, 2, 3]),
    ("csv", ["1e3", "+1", "1000", "0x1", "1_0"], ["+1", "0x1", "1000", "1_0", "1e3"], [4, 0, 2, 1, 3]),
    ("csv", ["1.0", "1", "2.0", "-0.0"], ["0", "1", "2"], [1, 1, 2, 0]),
    ("csv", ["2024-01-31", "1/2", "10:30"], ["1/2", "10:30", "2024-01-31"], [2, 0, 1]),
    ("csv", ["123456789012345678901", "2"], ["123456789012345678901", "2"], [0, 1]),
    ("csv", ["None", "NA", "nan", "null", "N/A"], ["N/A", "NA", "None", "nan", "null"], [2, 1, 3, 4, 0]),
    ("jsonl", [2, 0, 1], ["0", "1", "2"], [2, 0, 1]),
    ("jsonl", ["10", " 1", "2 "], ["1", "2", "10"], [2, 0, 1]),
    ("jsonl", ["10", "2", "two"], ["10", "2", "two"], [0, 1, 2]),
    ("jsonl", [10.0, 2.0, 1.0], ["1", "2", "10"], [2, 1, 0]),
    ("jsonl", [True, False], ["False", "True"], [1, 0]),
    ("jsonl", ["01", 1, "1", 1.0, "1.0"], ["01", "1", "1.0"], [0, 1, 1, 1, 2]),
    ("jsonl", ["2024-01-31", "2024-01-31T10:00:00Z"], ["2024-01-31", "2024-01-31T10:00:00Z"], [0, 1]),
]


@pytest.mark.parametrize("kind, labels, names, ids", LABELS)
def test_labels_of_each_kind(load, tmp_path, kind, labels, names, ids):
    file = tmp_path / f"rows.{kind}"
    if kind == "csv":
        write_csv(file, [f"text {i},{label}" for i, label in enumerate(labels)])
    else:
        file.write_text("\n".join(json.dumps({"text": f"text {i}", "label": label}) for i, label in enumerate(labels)))
    for rows in load("--train_file", file, "--test_file", file).values():
        assert rows.features["labels"].names == names and rows["labels"][:] == ids


def test_columns_by_any_name_beside_others(load, tmp_path):
    rows = [{"length": f"text {i}", "stars": i % 3, "labels": i, "text": None, "text_pair": i} for i in range(6)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = load("--dataset_name", tmp_path, "--text_column", "length", "--label_column", "stars")
    for rows in splits.values():
        assert set(rows.column_names) == {"text", "labels", "row"} and rows["labels"][:] == [0, 1, 2] * 2
        assert rows["text"][:] == [f"text {i}" for i in range(6)]


def test_declared_classes_stay_though_train_lacks_one(load, tmp_path, capsys):
    names = ["very good", "bad", "so so"]  # not sorted: their order is what counts
    write_split(tmp_path, "train", [("a", 0), ("b", 1), ("c", 1)], names)
    write_split(tmp_path, "test", [("d", 2), ("e", 0)], names)
    splits = load("--dataset_name", tmp_path)
    assert splits["train"].features["labels"].names == splits["test"].features["labels"].names == names
    assert splits["train"]["labels"][:] == [0, 1, 1] and splits["test"]["labels"][:] == [2, 0]
    (counts,) = re.findall("^train: 3 of 3 rows, (.*)", capsys.readouterr().out, re.M)
    assert ast.literal_eval(counts) == {"very good": 1, "bad": 2, "so so": 0}


# ---------------------------------------------------------------------------------------- rows without text or label
NAN = float("nan")
MISSING = [  # kind of file, rows (text, label), rows left out
    ("csv", [("a", 1), (None, 0), ("b", 0), ("  ", 1), ("c", 1)], [1, 3]),
    ("csv", [("a", "x"), ("b", "y"), ("c", None), ("d", " ")], [2, 3]),
    ("csv", [("a", 1), ("b", 2), ("c", None)], [2]),
    ("csv", [("a", True), ("b", None), ("c", False)], [1]),
    ("jsonl", [("a", 1), ("b", None), ("c", 0)], [1]),
    ("jsonl", [("\t\n", "x"), ("b", "x"), (None, "y"), ("c", "y"), ("d", "")], [0, 2, 4]),
    ("jsonl", [("a", 1), ("b", NAN), ("c", 0)], [1]),
    ("parquet", [("a", 1.0), ("b", NAN), ("c", 2.0), ("d", None)], [1, 3]),
]


@pytest.mark.parametrize("kind, rows, missing", MISSING)
def test_rows_without_text_or_label_are_left_out_with_one_warning(load, tmp_path, caplog, capsys, kind, rows, missing):
    good = [row for i, row in enumerate(rows) if i not in missing]
    for name, part in (("train", rows), ("test", good)):
        texts, labels = zip(*part, strict=True)
        file = tmp_path / f"{name}.{kind}"
        if kind == "csv":  # pandas writes None as an empty field
            pd.DataFrame({"text": texts, "label": pd.Series(labels, dtype=object)}).to_csv(file, index=False)
        elif kind == "jsonl":
            lines = [json.dumps({"text": text, "label": label}) for text, label in part]
            file.write_text("\n".join(lines))
        else:
            Dataset.from_dict({"text": texts, "label": labels}).to_parquet(file)
    splits = load("--train_file", tmp_path / f"train.{kind}", "--test_file", tmp_path / f"test.{kind}")
    for part in splits.values():
        assert part["text"][:] == [text for text, _ in good] and None not in part["labels"][:]
    assert splits["train"]["labels"][:] == splits["test"]["labels"][:]
    assert caplog.messages == [f"train: {len(missing)} of {len(rows)} rows without text or label are left out."]
    assert f"train: {len(good)} of {len(rows)} rows, " in capsys.readouterr().out


def test_minus_one_under_declared_classes_is_no_label(load, tmp_path, caplog):
    write_split(tmp_path, "train", [("a", 0), ("b", -1), ("c", 1)])
    write_split(tmp_path, "validation", [("a", 0), ("b", 1)])
    write_split(tmp_path, "test", [("d", -1), ("e", -1)])  # GLUE's are like this
    splits = load("--dataset_name", tmp_path)
    assert sizes(splits) == {"train": 2, "validation": 2} and splits["train"]["text"][:] == ["a", "c"]
    assert [message[:24] for message in caplog.messages] == ["train: 1 of 3 rows witho", "test: 2 of 2 rows withou"]


def test_row_without_its_second_text_is_left_out(load, tmp_path, caplog):
    file = write_csv(tmp_path / "pairs.csv", ["a,b,1", "c,,0", "d,e,0", ",f,1"], "text,other,label")
    splits = load("--train_file", file, "--test_file", file, "--text_pair_column", "other")
    assert splits["train"][:] == {"text": ["a", "d"], "text_pair": ["b", "e"], "labels": [1, 0], "row": [0, 2]}
    assert "2 of 4 rows" in caplog.messages[0]


def test_split_of_which_nothing_remains_counts_as_not_there(load, tmp_path, caplog, capsys):
    good = write_csv(tmp_path / "good.csv", GOOD * 5)
    empty = write_csv(tmp_path / "empty.csv", ["a,", "b,", ",1"])
    files = ("--train_file", good, "--validation_file", empty)
    assert sizes(load(*files, "--test_file", good)) == {"train": 20, "test": 20}
    assert caplog.messages[0].startswith("validation: 3 of 3 rows")
    assert sizes(load(*files, "--validation_fraction", "0.2")) == {"train": 16, "validation": 4}
    assert "validation: 4 of 20 rows, {'0': 2, '1': 2}" in capsys.readouterr().out
    with pytest.raises(UserError, match="no validation or test split"):
        load(*files)
    with pytest.raises(UserError, match=r"train has one label only, \[\]: nothing to learn"):
        load("--train_file", empty, "--test_file", good)


# ----------------------------------------------------------------------------------------------------------- pairs
NLI = ["entailment", "neutral", "contradiction"]
PAIRED = ("--text_column", "premise", "--text_pair_column", "hypothesis")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, argv):
    """A run on pairs as GLUE has them, by a BERT, whose token types tell both texts apart: (run, pairs by split)."""
    folder, rows = tmp_path_factory.mktemp("pairs"), {}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *NEUTRAL, *OPINION[0], *OPINION[1]]
    tokenizer = transformers.BertTokenizer({word: i for i, word in enumerate(words)}, model_max_length=64)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(**shape, vocab_size=len(words), max_position_embeddings=64)
    for part in (tokenizer, transformers.BertForSequenceClassification(config)):
        part.save_pretrained(folder / "model")
    for split, count in (("train", 64), ("validation_matched", 32), ("test", 6)):
        first, second = (make_reviews(count, seed=count + i) for i in (0, 1))
        labels = [-1 if split == "test" else i % 3 for i in range(count)]
        rows[split] = list(zip(first["text"], second["text"], labels, strict=True))
        write_split(folder / "nli", split, rows[split], NLI, ("premise", "hypothesis"))
    flags = ("--model_name_or_path", "model", "--dataset_name", "nli", *PAIRED, "--max_length", "20")
    splits = ("--validation_split", "validation_matched", "--test_split", "none", "--num_train_epochs", "1")
    run = Run([*argv, *flags, *splits], folder, prelude="show_batches.py").wait()
    assert run.status == 0, run.err
    return run, rows


def test_pairs_are_encoded_as_the_tokenizer_encodes_pairs(pairs):
    run, rows = pairs
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    cut = set()
    for name, split in (("TRAIN", "train"), ("EVAL", "validation_matched")):
        wanted = []
        for first, second, label in rows[split]:
            tokens = tokenizer(first, second, truncation="longest_first", max_length=20)
            wanted.append([tokens["input_ids"], tokens["token_type_ids"], label])
            cut.add((len(tokenizer(first)["input_ids"]) > 10, len(tokenizer(second)["input_ids"]) > 10))
        (shown,) = re.findall(f"^{name} (.*)", run.out, re.M)
        assert sorted(wanted) == sorted(json.loads(shown))
    assert len(cut) == 4, "either text is the longer one in some pair"
    (counts,) = re.findall("^train: 64 of 64 rows, (.*)", run.out, re.M)
    assert ast.literal_eval(counts) == {"entailment": 22, "neutral": 21, "contradiction": 21}
    assert "\nvalidation: 32 of 32 rows, " in run.out and "(macro F1 and AUC)" in run.out


def test_pipeline_gives_the_figures_reported_for_pairs(pairs):
    run, rows = pairs
    inputs = [{"text": first, "text_pair": second} for first, second, _ in rows["validation_matched"]]
    labels = [label for _, _, label in rows["validation_matched"]]
    scores = scores_of(run.folder / "results_rdrop", inputs)
    probabilities = np.array([scores[name] for name in NLI]).T
    figures = run.json("all_results.json")
    assert figures["eval_accuracy"] == accuracy_score(labels, probabilities.argmax(1))
    wanted = 0.9 * np.eye(3)[labels] + 0.1 / 3  # what the smoothed loss, which sees every token, is about
    assert figures["eval_loss"] == pytest.approx(-(wanted * np.log(probabilities)).sum(1).mean(), rel=1e-5)


# -------------------------------------------------------------------------------------------------------- messages
FILES = "--train_file data/train.csv --test_file data/test.csv"
LATIN = "très bien,1".encode("latin-1")
DATA = {  # what is wrong: flags, files of the folder `data`, and what the line must say
    "one file alone": ("--train_file data/train.csv", {"train.csv": GOOD}, ["--validation_fraction 0.1"]),
    "validation and fraction": (
        "--train_file data/train.csv --validation_file data/train.csv --validation_fraction 0.1",
        {"train.csv": GOOD},
        ["a validation split is there: leave out --validation_fraction"],
    ),
    "no data files": ("", {"notes.md": []}, ["cannot load data, split 'train' ("]),
    "file that is not there": (FILES, {"train.csv": GOOD}, ["cannot load data/test.csv (FileNotFoundError"]),
    "file of no known kind": ("--train_file data/t.txt", {"t.txt": GOOD}, ["data/t.txt does not end in .csv, "]),
    "train file without rows": (
        FILES,
        {"train.csv": [], "test.csv": GOOD},
        ["cannot load data/train.csv (ValueError: it holds no rows)"],
    ),
    "test file without rows": (
        FILES,
        {"train.csv": GOOD, "test.csv": []},
        ["cannot load data/test.csv (ValueError: it holds no rows)"],
    ),
    "file of no bytes": (
        "--train_file data/train.csv --test_file data/none.csv",
        {"train.csv": GOOD, "none.csv": []},
        ["cannot load data/none.csv (ValueError: it holds no rows)"],
    ),
    "empty split": (
        "",
        {"train.csv": GOOD, "test.csv": []},
        ["cannot load data, split 'test' (ValueError: it holds no rows)"],
    ),
    "empty train split": (
        "",
        {"train.csv": [], "test.csv": GOOD},
        ["cannot load data, split 'train' (ValueError: it holds no rows)"],
    ),
    "ragged csv": (
        FILES,
        {"train.csv": [*GOOD, "a,b,c,d"], "test.csv": GOOD},
        ["train.csv, near line 6: more or fewer fields"],
    ),
    "ragged split": (
        "",
        {"train.csv": [*GOOD, "a"], "test.csv": GOOD},
        ["data, split 'train' (Error: train.csv, near line 6: more or fewer fields", "--quoting none"],
    ),
    "files of two kinds": (
        "",
        {"train.csv": GOOD, "test.jsonl": ['{"text": "a"}']},
        ["cannot load data, split 'train' (", "same"],
    ),
    "comma that is not quoted": (
        FILES,
        {"train.csv": ["dull, and so,0", "fine, and so,1"], "test.csv": GOOD},
        ["cannot load data/train.csv (Error: train.csv, near line 2: more or fewer fields", "csv with commas"],
    ),
    "latin-1 csv": (FILES, {"train.csv": [*GOOD, LATIN], "test.csv": GOOD}, ["data/train.csv (Uni", "UTF-8"]),
    "latin-1 test file": (FILES, {"train.csv": GOOD, "test.csv": [LATIN]}, ["data/test.csv (Uni", "UTF-8"]),
    "latin-1 jsonl": (
        "--train_file data/train.jsonl --validation_fraction 0.5",
        {"train.jsonl": ['{"text": "très bien", "label": 1}'.encode("latin-1")]},
        ["utf-8"],
    ),
    "no header line": (
        FILES.replace("train.csv", "none.csv"),
        {"none.csv": GOOD, "test.csv": GOOD},
        [
            "data/none.csv (ValueError: no column 'text', only ['a fine film', '1'])",
            "--text_column",
            "with a header line",
        ],
    ),
    "semicolons": (
        FILES.replace("train.csv", "none.csv"),
        {"none.csv": ["text;label", "a;1", "b;0"], "test.csv": GOOD},
        ["data/none.csv (ValueError: no column 'text', only ['text;label'])", "csv with commas"],
    ),
    "no such text column": ("--text_column review", {}, ["no column 'review', only ['text', 'label']"]),
    "no such label column": ("--label_column stars", {}, ["no column 'stars', only ['text', 'label']"]),
    "no such second column": ("--text_pair_column b", {}, ["no column 'b', only ['text', 'label']"]),
    "no text column in test": (
        FILES.replace("test.csv", "none.csv"),
        {"train.csv": GOOD, "none.csv": GOOD},
        ["data/none.csv (ValueError: no column 'text', only ['a fine film', '1'])"],
    ),
    "texts are numbers": (
        "--train_file data/train.csv --test_file data/test.jsonl",
        {"train.csv": GOOD, "test.jsonl": ['{"text": "a", "label": 1}', '{"text": 2, "label": 0}']},
        ["data/test.jsonl (ValueError: row 1 holds 2, not text)"],
    ),
    "unknown label": (
        FILES,
        {"train.csv": GOOD, "test.csv": ["a,0", "b,7"]},
        ["test has labels ['7'], train only ['0', '1']"],
    ),
    "unknown label after a row left out": (
        FILES,
        {"train.csv": ["a,good", "b,bad"], "test.csv": [",bad", "a,good", "b,ugly"]},
        ["test has labels ['ugly'], train only ['bad', 'good']"],
    ),
    "fractions as labels": (
        FILES,
        {"train.csv": ["a,0.5", "b,1"], "test.csv": GOOD},
        ["integers or strings", "not 0.5"],
    ),
    "labels are lists": (
        "--train_file data/train.jsonl --validation_fraction 0.5",
        {"train.jsonl": ['{"text": "a", "label": [0, 2]}']},
        ["one a text, not [0, 2]", "--label_column"],
    ),
    "labels are floats": (
        "--train_file data/train.jsonl --validation_fraction 0.5",
        {"train.jsonl": ['{"text": "a", "label": 3.25}']},
        ["one a text, not 3.25"],
    ),
    "class of one row": (
        "--train_file data/train.csv --validation_fraction 0.2",
        {"train.csv": [*GOOD * 5, "so so,it is rare"]},
        ["class 'it is rare' has one row", "--validation_fraction"],
    ),
    "broken line": (
        "--train_file data/train.jsonl --validation_fraction 0.2",
        {"train.jsonl": ['{"text": "a", "label": 1}', "", '{"text": "b" "label": 0}']},
        ["data/train.jsonl (ValueError: line 3, column 14: Expecting ',' delimiter)"],
    ),
    "columns, not records": (
        "--train_file data/train.json --validation_fraction 0.2",
        {"train.json": [pd.DataFrame({"text": ["a", "b"] * 5000, "label": [0, 1] * 5000}).to_json()]},
        ["records"],
    ),
    "stray quote": (
        FILES,
        {"train.csv": GOOD, "test.csv": ['"so" so,0', *GOOD]},
        ["cannot load data/test.csv (Error: ", "--quoting none"],
    ),
    "quote never closed": (
        FILES,
        {"train.csv": GOOD, "test.csv": [*GOOD, '"so so,0', *GOOD]},
        ["cannot load data/test.csv (Error: test.csv, near line 5: unexpected end of data", "--quoting none"],
    ),
    "two columns of one name": (
        "--train_file data/none.csv --validation_fraction 0.5",
        {"none.csv": ["text,label,text", "a,1,b", "b,0,c"]},
        ["two columns 'text'"],
    ),
    "key that no record has": (
        "--train_file data/train.jsonl --validation_fraction 0.5",
        {"train.jsonl": ['{"text": "a", "stars": 1}', '{"text": "b", "stars": 2}']},
        ["no column 'label', only ['text', 'stars']"],
    ),
    "several files for one split": (
        "",
        {"train.csv": GOOD, "test.csv": GOOD, "test_masked.csv": ["a,0"]},
        ["several files for test", "'test.csv', 'test_masked.csv'", "--test_file"],
    ),
    "one label only": (FILES, {"train.csv": ["a,0", "b,0"], "test.csv": GOOD}, ["one label only"]),
    "no AUC to choose by": (
        "--metric_for_best_model auc",
        {"train.csv": GOOD, "test.csv": GOOD[::2]},
        ["--metric_for_best_model auc is undefined"],
    ),
    "too little to be stratified": (
        "--validation_fraction 0.1",
        {"train.csv": GOOD, "test.csv": GOOD},
        ["The test_size = 1 should be greater or equal to the number of classes"],
    ),
    "no room for words": (
        "--train_file data/none.csv --test_file data/none.csv --max_length 4 --text_pair_column b",
        {"none.csv": ["text,b,label", "so,fine,1", "so,dull,0"]},
        ["--max_length leaves no room beside the special tokens"],
    ),
}


WHOLE = ["ragged split", "latin-1 csv", "no AUC to choose by", "no room for words"]  # through the script


@pytest.mark.parametrize("what", DATA)
def test_mistaken_data_ends_in_one_line(start, load, tmp_path, monkeypatch, what):
    flags, files, words = DATA[what]
    (tmp_path / "data").mkdir()
    for name, lines in files.items():
        header = ["text,label"] if name.endswith(".csv") and name != "none.csv" else []
        lines = [line if isinstance(line, bytes) else line.encode() for line in (*header, *lines)]
        (tmp_path / "data" / name).write_bytes(b"\n".join(lines) + (b"\n" if lines else b""))
    flags = (*(["--dataset_name", "data"] if files else []), *flags.split())
    if what in WHOLE:
        run = start(*flags).wait()
        run.assert_one_line(2, *words)
        assert "new weights" not in run.out and not list(tmp_path.rglob("arguments.json"))
    else:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError) as error:
            load(*flags)
        assert all(word in str(error.value) for word in words), error.value
        assert len(str(error.value)) < 1000


def test_message_shows_as_many_columns_and_classes_as_fit_a_line(load, tmp_path):
    many = [f"column{i}" for i in range(100)]
    wide = write_csv(tmp_path / "wide.csv", [",".join(many)], ",".join(many))
    with pytest.raises(UserError, match=r"only \['column0', 'column1', .* --text_column") as error:
        load("--train_file", wide, "--test_file", wide)
    assert len(str(error.value)) < 600  # of which more than 100 are the path
    classes = write_csv(tmp_path / "classes.csv", [f"text,class{i}" for i in range(100)])
    with pytest.raises(UserError, match=r"test has labels \['0', '1'\], train only \['class0', 'class1', ") as error:
        load("--train_file", classes, "--test_file", write_csv(tmp_path / "test.csv", ["a,class1"] * 4 + GOOD))
    assert len(str(error.value)) < 600


def test_bug_in_the_reading_of_data_is_not_taken_for_a_mistake_of_the_user(load, tmp_path, monkeypatch):
    monkeypatch.setattr(train_rdrop, "label_name", lambda value, feature: {}[value])
    file = write_csv(tmp_path / "rows.csv", [*GOOD, "not read before,1"])
    with pytest.raises(datasets.exceptions.DatasetGenerationError) as error:
        load("--train_file", file, "--test_file", file)
    assert isinstance(error.value.__cause__, KeyError)


def test_quote_that_ends_amid_a_field_is_named_with_its_line(load, tmp_path):
    file = write_csv(tmp_path / "rows.csv", [*GOOD, '"so" fine,1'])
    with pytest.raises(UserError, match=r"\(Error: rows.csv, near line 5: '.' expected after .*--quoting none"):
        load("--train_file", file, "--test_file", file)
