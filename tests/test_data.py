"""What `load_splits` reads from files and folders: rows, classes and splits, compared with what was written."""

import csv
import gzip
import json
import os
import random
from datetime import datetime

import datasets
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from train_rdrop import OwnArguments, UserError, load_splits

GOOD = ["a fine film,1", "a dull film,0", "so fine,1", "so dull,0"]


def write(file, lines, header="text,label"):
    """Write a header and `lines` into `file`, and return it."""
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return file


def load(file, **arguments):
    """The rows of `file`, as train and as test alike."""
    splits = load_splits(OwnArguments(train_file=str(file), test_file=str(file), **arguments))
    assert splits["train"][:] == splits["test"][:]
    return splits["train"]


def load_folder(folder, **arguments):
    return load_splits(OwnArguments(dataset_name=str(folder), **arguments))


def labels_of(rows):
    return [rows.features["labels"].names[label] for label in rows["labels"]]


def sizes(splits):
    return {split: len(rows) for split, rows in splits.items()}


def write_parquet(file, texts, labels, names):
    """A split as the Hub holds it: labels are numbers, `names` their names."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    file.parent.mkdir(exist_ok=True, parents=True)
    Dataset.from_dict({"text": texts, "label": labels}, features).to_parquet(file)


# ---- kinds of files
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


@pytest.mark.parametrize("kind", KINDS)
def test_file_of_each_kind(tmp_path, kind):
    for end in [""] if kind == "parquet" else ["", ".gz"]:
        file = tmp_path / f"reviews.2024.{kind}{end}"
        KINDS[kind](pd.DataFrame(TABLE), file)
        assert (file.read_bytes()[:2] == b"\x1f\x8b") == (end == ".gz")
        rows = load(file, text_column="review", label_column="stars")
        assert rows["text"][:] == TABLE["review"] and labels_of(rows) == TABLE["stars"]
        assert rows.features["labels"].names == ["NA", "None", "good"] and rows["row"][:] == list(range(6))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_folder_of_each_kind(tmp_path, kind):
    for split, rows in (("train", slice(None)), ("test", slice(2))):
        KINDS[kind](pd.DataFrame(TABLE)[rows], tmp_path / f"{split}.{kind}")
    splits = load_folder(tmp_path, text_column="review", label_column="stars")
    assert splits["train"]["text"][:] == TABLE["review"] and labels_of(splits["train"]) == TABLE["stars"]
    assert splits["test"]["text"][:] == TABLE["review"][:2] and labels_of(splits["test"]) == ["good", "good"]


def test_folder_of_arrow_files(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
    for split in ("train", "test"):
        rows = Dataset.from_dict({"text": [f"{split} a", f"{split} b"], "label": [1, 0]}, features)
        rows.save_to_disk(tmp_path / "saved" / split)
        (tmp_path / "data").mkdir(exist_ok=True)
        (part,) = (tmp_path / "saved" / split).glob("*.arrow")
        part.rename(tmp_path / "data" / f"{split}.arrow")
    splits = load_folder(tmp_path / "data")
    assert splits["test"]["text"][:] == ["test a", "test b"] and labels_of(splits["test"]) == ["neg", "pos"]
    assert splits["train"].features["labels"].names == ["pos", "neg"]


def test_key_that_comes_late_and_text_that_looks_like_a_date(tmp_path):
    rows = [{"text": f"2024-01-{row % 30 + 1:02}", "label": row % 2, "late": None} for row in range(300)]
    for row in rows[200:]:
        row |= {"late": "3 votes", "later": [{"at": "2024-01-31"}]}
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    read = load(tmp_path / "rows.jsonl")
    assert read["text"][:] == [row["text"] for row in rows] and read["labels"][:] == [0, 1] * 150


# ---- labels
LABELS = [  # kind of file, labels as written, the names of the classes, the labels as their numbers
    ("csv", [" good", "good ", "bad", "  so so"], ["bad", "good", "so so"], [1, 1, 0, 2]),
    ("csv", ["10", "1", "2", "-1"], ["-1", "1", "2", "10"], [3, 1, 2, 0]),
    ("csv", ["True", "true", "TRUE", "1"], ["1", "TRUE", "True", "true"], [2, 3, 1, 0]),
    ("csv", ["01", "1", "02", "10"], ["01", "1", "02", "10"], [0, 1, 2, 3]),
    ("csv", ["1.0", "1", "2.0"], ["1", "2"], [0, 0, 1]),
    ("csv", ["1e3", "+1", "1000", "0x1", "1_0"], ["+1", "0x1", "1000", "1_0", "1e3"], [4, 0, 2, 1, 3]),
    ("csv", ["None", "NA", "nan", "null", "N/A"], ["N/A", "NA", "None", "nan", "null"], [2, 1, 3, 4, 0]),
    ("csv", ["123456789012345678901", "2"], ["123456789012345678901", "2"], [0, 1]),
    ("jsonl", [10.0, 2, "1"], ["1", "2", "10"], [2, 1, 0]),
    ("jsonl", [True, False], ["False", "True"], [1, 0]),
]


@pytest.mark.parametrize("kind, labels, names, numbers", LABELS)
def test_labels_are_taken_as_spelled(tmp_path, kind, labels, names, numbers):
    file = tmp_path / f"rows.{kind}"
    if kind == "csv":
        write(file, [f"text {i},{label}" for i, label in enumerate(labels)])
    else:
        file.write_text("\n".join(json.dumps({"text": f"text {i}", "label": label}) for i, label in enumerate(labels)))
    rows = load(file)
    assert rows.features["labels"].names == names and rows["labels"][:] == numbers


def test_declared_classes_stay_in_their_order_though_train_lacks_one(tmp_path):
    names = ["very good", "bad", "so so"]
    write_parquet(tmp_path / "train.parquet", ["a", "b", "c"], [0, 1, 1], names)
    write_parquet(tmp_path / "test.parquet", ["d", "e"], [2, 0], names)
    splits = load_folder(tmp_path)
    assert splits["train"].features["labels"].names == splits["test"].features["labels"].names == names
    assert splits["test"]["labels"][:] == [2, 0]


def test_test_file_that_declares_its_classes_in_another_order_is_mapped_by_name(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["a", "b", "c"], [0, 1, 2], ["bad", "fair", "good"])
    write_parquet(tmp_path / "test.parquet", ["d", "e"], [0, 1], ["good", "bad"])
    assert labels_of(load_folder(tmp_path)["test"]) == ["good", "bad"]
    assert load_folder(tmp_path)["test"]["labels"][:] == [2, 0]


def test_card_of_a_csv_folder_declares_the_classes(tmp_path):
    names = ["None", "neg", "pos"]
    card = ["---", "dataset_info:", "  features:", "  - name: text", "    dtype: string", "  - name: label"]
    card += ["    dtype:", "      class_label:", "        names:"]
    card += [f"          '{i}': {name}" for i, name in enumerate(names)]
    write(tmp_path / "README.md", [*card[1:], "---"], header="---")
    write(tmp_path / "train.csv", ["a,0", "b,1", "c,2", "d,-1", "e,None"])
    write(tmp_path / "test.csv", ["f,pos", "g,None", "h,1"])
    splits = load_folder(tmp_path)
    assert splits["train"].features["labels"].names == names
    assert splits["train"]["labels"][:] == [0, 1, 2, 0] and splits["train"]["row"][:] == [0, 1, 2, 4]
    assert splits["test"]["labels"][:] == [2, 0, 1]


# ---- rows without a text or without a label
MISSING = [  # kind of file, rows (text, label), the rows left out
    ("csv", [("a", 1), (None, 0), ("b", 0), ("  ", 1), ("c", 1)], [1, 3]),
    ("csv", [("a", "x"), ("b", "y"), ("c", None), ("d", " ")], [2, 3]),
    ("csv", [("a", 1.0), ("b", 2.0), ("c", None)], [2]),
    ("jsonl", [("\t\n", "x"), ("b", "x"), (None, "y"), ("c", "y"), ("d", "")], [0, 2, 4]),
    ("parquet", [("a", 1.0), ("b", float("nan")), ("c", 2.0), ("d", None)], [1, 3]),
]


@pytest.mark.parametrize("kind, rows, missing", MISSING)
def test_rows_without_text_or_label_are_left_out_and_others_keep_their_number(tmp_path, caplog, kind, rows, missing):
    file = tmp_path / f"rows.{kind}"
    table = pd.DataFrame(rows, columns=["text", "label"])
    if kind == "jsonl":
        file.write_text("\n".join(json.dumps(dict(zip(table.columns, row, strict=True))) for row in rows))
    else:
        KINDS[kind](table, file)
    read = load(file)
    kept = [row for row in range(len(rows)) if row not in missing]
    assert read["row"][:] == kept and read["text"][:] == [rows[row][0] for row in kept]
    assert all(str(len(missing)) in message and str(len(rows)) in message for message in caplog.messages)
    assert len(caplog.messages) == 2, "one for each split"


def test_label_of_minus_one_is_missing_where_classes_are_declared(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["a", "b", "c"], [0, -1, 1], ["neg", "pos"])
    write_parquet(tmp_path / "validation.parquet", ["d", "e"], [1, 0], ["neg", "pos"])
    write_parquet(tmp_path / "test.parquet", ["f", "g"], [-1, -1], ["neg", "pos"])  # as in GLUE
    splits = load_folder(tmp_path)
    assert sizes(splits) == {"train": 2, "validation": 2} and splits["train"]["row"][:] == [0, 2]
    assert load(write(tmp_path / "rows.csv", ["a,-1", "b,1"])).features["labels"].names == ["-1", "1"]


def test_pairs_of_texts(tmp_path):
    lines = ["a,so it is,1", "b,is it,0", "c,,1", ",d,0"]
    rows = load(
        write(tmp_path / "pairs.csv", lines, "premise,other,label"), text_column="premise", text_pair_column="other"
    )
    assert rows["text"][:] == ["a", "b"] and rows["text_pair"][:] == ["so it is", "is it"]


# ---- stray quotes
STRAY = ["a film\t1", '"so dull\t0', "a plot\t1", 'so fine"\t1', "so so\t0"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv.gz"])
def test_rows_that_stray_quotes_swallow_are_not_lost_in_silence(tmp_path, caplog, name):
    lines = ["text\tlabel", *STRAY]
    text = "\n".join(line.replace("\t", "," if "csv" in name else "\t") for line in lines) + "\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert len(load(tmp_path / name)) == 3
    assert all("--quoting none" in message for message in caplog.messages) and len(caplog.messages) == 2
    caplog.clear()
    rows = load(tmp_path / name, quoting="none")
    assert rows["text"][:] == [line.split("\t")[0] for line in STRAY] and not caplog.messages


def test_quote_that_breaks_the_file_is_an_error(tmp_path):
    for line in ('"so" so,0', '"so so,0'):
        file = write(tmp_path / "rows.csv", [*GOOD, line, *GOOD])
        with pytest.raises(UserError, match="--quoting none"):
            load(file)
        assert len(load(file, quoting="none")) == 9


# ---- what is refused
REFUSED = {  # lines of a csv file, the first of them its header
    "row that is too short": ["text,label", *GOOD, "a"],
    "row that is too long": ["text,label", *GOOD, "a,1,b"],
    "comma that is not quoted": ["text,label", "dull, and so,0", "fine, and so,1"],
    "two columns of one name": ["text,label,text", "a,1,b", "b,0,c"],
    "no column text": ["a,b", *GOOD],
    "no column label": ["text,b", *GOOD],
    "no rows": ["text,label"],
    "no bytes": [],
    "one class": ["text,label", "a,1", "b,1"],
}


@pytest.mark.parametrize("what", REFUSED)
def test_file_that_cannot_be_trained_on_is_refused(tmp_path, what):
    file = tmp_path / "rows.csv"
    file.write_text("".join(line + "\n" for line in REFUSED[what]))
    with pytest.raises(UserError):
        load(file)


def test_label_that_is_no_class_is_refused(tmp_path):
    for label in ([0, 2], {"a": 1}, 0.5):
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": "a", "label": x}) for x in (0, 1, label)))
        with pytest.raises(UserError, match=r"rows\.jsonl"):
            load(tmp_path / "rows.jsonl")


def test_label_that_train_does_not_have_is_refused(tmp_path):
    train, test = write(tmp_path / "train.csv", GOOD), write(tmp_path / "test.csv", [",0", "a,0", "b,ugly"])
    with pytest.raises(UserError, match="ugly"):
        load_splits(OwnArguments(train_file=str(train), test_file=str(test)))


def test_several_files_of_one_split_are_refused(tmp_path):
    for folder, other in (("one", "train_old.csv"), ("two", "old/train.csv")):
        for name in ("train.csv", "test.csv", other):
            write(tmp_path / folder / name, GOOD)
        with pytest.raises(UserError, match=os.path.basename(other)):
            load_folder(tmp_path / folder)


# ---- splits
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_shards_are_one_split(tmp_path, kind):
    for shard in range(3):
        table = pd.DataFrame({"text": [f"{shard} a", f"{shard} b"], "label": ["01", "2"]})
        KINDS[kind](table, tmp_path / f"train-0000{shard}-of-00003.{kind}")
    KINDS[kind](table, tmp_path / f"test.{kind}")
    rows = load_folder(tmp_path)["train"]
    assert rows["text"][:] == ["0 a", "0 b", "1 a", "1 b", "2 a", "2 b"] and labels_of(rows) == ["01", "2"] * 3
    assert rows["row"][:] == list(range(6))


SIZES = {"train": 40, "validation": 12, "test": 20, "validation_matched": 14, "unsupervised": 8}
ALL = ["train", "validation", "test"]
RULE = [  # splits there are, arguments, splits used: the number of their rows
    (["train", "test"], {}, {"train": 40, "test": 20}),
    (ALL, {}, {"train": 40, "validation": 12, "test": 20}),
    (ALL, {"validation_split": "none"}, {"train": 40, "test": 20}),
    (ALL, {"test_split": "none"}, {"train": 40, "validation": 12}),
    (ALL, {"validation_split": "none", "validation_fraction": 0.25}, {"train": 30, "validation": 10, "test": 20}),
    (["train"], {"validation_fraction": 0.1}, {"train": 36, "validation": 4}),
    (["train", "validation_matched"], {"validation_split": "validation_matched"}, {"train": 40, "validation": 14}),
]
NO_RULE = [
    (["train"], {}),
    (ALL, {"validation_fraction": 0.1}),
    (["train", "test"], {"validation_split": "dev"}),
    (["validation", "test"], {}),
]


def write_splits(folder, names):
    for split in [*names, "unsupervised"]:  # as in IMDB
        rows = range(SIZES[split])
        labels = [-1 if split == "unsupervised" else row % 2 for row in rows]
        file = folder / "data" / f"{split}-00000-of-00001.parquet"
        write_parquet(file, [f"{split} {row}" for row in rows], labels, ["neg", "pos"])


@pytest.mark.parametrize("there, arguments, used", RULE)
def test_which_splits_are_used(tmp_path, there, arguments, used):
    write_splits(tmp_path, there)
    splits = load_folder(tmp_path, **arguments)
    assert sizes(splits) == used
    assert all(text.startswith("train ") for text in splits["train"]["text"])
    assert all(text.startswith("test ") for text in splits.get("test", {"text": []})["text"])


def test_which_splits_are_refused(tmp_path):
    for i, (there, arguments) in enumerate(NO_RULE):
        write_splits(tmp_path / str(i), there)
        with pytest.raises(UserError):
            load_folder(tmp_path / str(i), **arguments)


def test_validation_and_test_file_beside_a_folder(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        write(tmp_path / "data" / f"{split}.csv", GOOD * count)
    file = write(tmp_path / "dev.csv", GOOD)
    splits = load_folder(tmp_path / "data", validation_file=str(file))
    assert sizes(splits) == {"train": 12, "validation": 4, "test": 8}
    assert sizes(load_folder(tmp_path / "data", test_file=str(file))) == {"train": 12, "test": 4}


def test_configuration_of_a_data_set(tmp_path):
    for name in ("en", "de"):
        for split in ("train", "test"):
            write(tmp_path / name / f"{split}.csv", [f"{name} {row},{row % 2}" for row in range(4)])
    configs = [line for name in ("en", "de") for line in (f"- config_name: {name}", f"  data_dir: {name}")]
    write(tmp_path / "README.md", ["configs:", *configs, "---"], header="---")
    assert load_folder(tmp_path, dataset_config_name="de")["train"]["text"][0] == "de 0"
    with pytest.raises(UserError):
        load_folder(tmp_path)


def test_held_out_part_is_stratified_and_drawn_with_the_seed(tmp_path):
    file = write(tmp_path / "rows.csv", [f"text {row},{row // 80}" for row in range(100)])  # 80 of 0, 20 of 1
    args = OwnArguments(train_file=str(file), validation_fraction=0.1)
    held = load_splits(args, seed=1)
    assert sizes(held) == {"train": 90, "validation": 10} and sum(held["validation"]["labels"]) == 2
    assert sorted(held["train"]["row"][:] + held["validation"]["row"][:]) == list(range(100))
    again, other = load_splits(args, seed=1), load_splits(args, seed=2)
    assert held["validation"]["row"][:] == again["validation"]["row"][:] != other["validation"]["row"][:]


def test_samples_are_drawn_with_the_seed_from_all_rows(tmp_path):
    file = write(tmp_path / "rows.csv", [f"text {row},{row // 80}" for row in range(100)])
    arguments = {"train_file": str(file), "test_file": str(file)}
    args = OwnArguments(**arguments, max_train_samples=60, max_eval_samples=50)
    part, again, other = (load_splits(args, seed=seed) for seed in (1, 1, 2))
    assert sizes(part) == {"train": 60, "test": 50} and 0 < sum(part["train"]["labels"]) < 20
    assert part["train"]["row"][:] == again["train"]["row"][:] != other["train"]["row"][:]


# ---- cache
def test_cache_of_the_library_does_not_matter(tmp_path):
    """`datasets` would read 01 as 1 and NA as missing, and keeps the types that it guessed in its cache."""
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}.csv", ["007,01", "12.50,NA", "None,01", "1e5,NA"])
    train, test = (str(tmp_path / "data" / f"{split}.csv") for split in ("train", "test"))
    guessed = datasets.load_dataset("csv", data_files=train, split="train")
    datasets.load_dataset(str(tmp_path / "data"))
    assert guessed["label"][:] != ["01", "NA", "01", "NA"], "else this test would show nothing"
    for arguments in ({"train_file": train, "test_file": test}, {"dataset_name": str(tmp_path / "data")}):
        for rows in load_splits(OwnArguments(**arguments)).values():
            assert rows["text"][:] == ["007", "12.50", "None", "1e5"] and labels_of(rows) == ["01", "NA"] * 2


def test_changed_file_is_read_again(tmp_path):
    for kind in ("csv", "parquet"):
        for day, texts in ((1, ["a", "b"]), (2, ["c", "d"]), (2, ["e", "f"])):
            KINDS[kind](pd.DataFrame({"text": texts, "label": [0, 1]}), tmp_path / f"rows.{kind}")
            # the last one replaces a file of the same age, as copies of a dataset's folds may
            os.utime(tmp_path / f"rows.{kind}", (datetime(2024, 1, day).timestamp(),) * 2)
            assert load(tmp_path / f"rows.{kind}")["text"][:] == texts


def test_brackets_in_the_name_of_a_file_are_no_pattern(tmp_path):
    write(tmp_path / "rows1.csv", ["x,0", "y,1"])  # what the other name would mean as a pattern
    assert load(write(tmp_path / "rows[1].csv", ["a,0", "b,1"]))["text"][:] == ["a", "b"]


# ---- random files
WORDS = ["film", "très", "很好", '"', 'so "fine"', ",", "\t", "\n", "\r\n", "007", "12.50", "null", "'", "\\", "\u2028"]
WORDS += ["\ufeff", "NaN", "=1+1", "[", "{", "#", " ", ";", "\x1b[31m", "é", "😀"]
CLASSES = [["0", "1"], ["01", "1", "2"], ["good", "bad"], ["True", "False"], ["None", "NA"], ["10", "9", "x"]]
CLASSES += [["1e3", "1000"], ['"', "a\nb", "c,d"], ["-1", "1"]]


@pytest.mark.parametrize("seed", range(12))
def test_random_file_is_read_as_python_reads_it(tmp_path, seed):
    rng = random.Random(seed)
    kind = ("csv", "tsv", "json", "jsonl")[seed % 4]
    file = tmp_path / f"rows.{kind}"
    names = ["text", "label", *rng.sample(["Text", "text ", "té\nxt", "a,b", "0"], 2)]
    rng.shuffle(names)
    labels = rng.choice(CLASSES)
    rows = []
    for _ in range(40):
        row = {name: "".join(rng.choices(WORDS, k=rng.randint(0, 6))) for name in names}
        rows.append(row | {"label": rng.choice([*labels * 3, ""])})
    with file.open("w", encoding=rng.choice(["utf-8", "utf-8-sig"]), newline="") as stream:
        if kind in ("json", "jsonl"):
            lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
            stream.write(f"[{', '.join(lines)}]" if kind == "json" else "\n".join(lines))
        else:
            quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
            end = rng.choice(["\n", "\r\n"])
            options = {"delimiter": "," if kind == "csv" else "\t", "quoting": quoting, "lineterminator": end}
            writer = csv.DictWriter(stream, names, **options)
            writer.writeheader()
            writer.writerows(rows)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        if kind in ("json", "jsonl"):
            found = json.load(stream) if kind == "json" else [json.loads(line) for line in stream.read().split("\n")]
        else:
            found = list(csv.DictReader(stream, delimiter=options["delimiter"]))
    wanted = [(i, row["text"], row["label"]) for i, row in enumerate(found) if row["text"].strip() and row["label"]]
    read = load(file)
    assert list(zip(read["row"], read["text"], labels_of(read), strict=True)) == wanted
    assert found == rows
