"""Data files as they lie: values as spelled, no row swallowed, none guessed, in whatever folder, of whatever size."""

import csv
import gzip
import json
import os
import random
import re

import pandas as pd
import pytest

from train_rdrop import DataArguments, UserError, load_splits


def load(file, **flags):
    """The rows of `file`, of train and test alike."""
    return load_splits(DataArguments(train_file=str(file), test_file=str(file), **flags))["train"]


def labels_of(rows):
    return [rows.features["labels"].names[label] for label in rows["labels"]]


def write(file, rows, header="text,label"):
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join([header, *rows]) + "\n")
    return file


# ----------------------------------------------------------------------------------------------- values as spelled
def test_values_of_a_long_csv_file_are_as_spelled(tmp_path):
    """Each column looks like another type in the first 10,000 rows, or in none."""
    labels = ["True", "False"] * 5000 + ["maybe", "true", "01", "1", "1.0", "2.0"] * 10
    texts = [str(row) for row in range(10_000)] + ["007", "12.50", "1e5", "NaN", "None", "2024-01-31"] * 10
    unused = [str(row) if row < 10_030 else f"n{row}" for row in range(10_060)]
    empty_at_first = ["" if row < 10_030 else "0.5" for row in range(10_060)]
    table = {"unused": unused, "label": labels, "text": texts, "empty": empty_at_first}
    pd.DataFrame(table).to_csv(tmp_path / "rows.csv", index=False)
    rows = load(tmp_path / "rows.csv")
    assert rows["text"][:] == texts and rows["row"][:] == list(range(10_060))
    spelled = {"1.0": "1", "2.0": "2"}  # as pandas writes integers where a field is empty
    assert labels_of(rows) == [spelled.get(label, label) for label in labels]
    assert rows.features["labels"].names == ["01", "1", "2", "False", "True", "maybe", "true"]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_optional_key_may_come_late_in_a_long_json_file(tmp_path, kind):
    rows = [{"text": f"2024-01-{row % 30 + 1:02}", "label": row % 2, "late": None} for row in range(400)]
    rows[3]["text"] = "long " * 2_500_000  # more than the 10 MB of a chunk
    for row in range(300, 400):
        rows[row] |= {"late": "3 votes", "later": [{"at": "2024-01-31"}]}
    text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"rows.{kind}").write_text(text)
    read = load(tmp_path / f"rows.{kind}")
    assert read["text"][:] == [row["text"] for row in rows] and read["labels"][:] == [0, 1] * 200


def test_codes_and_terminal_escapes_as_labels(start, tmp_path):
    """The class 01 is not the class 1; what the terminal shows has no escapes, what is saved is as spelled."""
    red, bell = "red\x1b[31m", "bell\x07 " + "long" * 50
    table = {"text\x1b[31m": ["a film", "the film", "a plot", "a story"] * 8, "label": ["01", "1", red, bell] * 8}
    pd.DataFrame(table).to_csv(tmp_path / "rows.csv", index=False)
    pd.DataFrame({"text\x1b[31m": ["a"] * 4, "label": ["01", "1", red, "\x1b[31mx"]}).to_csv(tmp_path / "other.csv")
    flags = ("--text_column", "text\x1b[31m", "--train_file", "rows.csv", "--num_train_epochs", "1")
    run = start(*flags, "--validation_fraction", "0.5").wait()
    assert run.status == 0, run.err
    assert set(run.json("config.json")["label2id"]) == {"01", "1", red, bell}
    refused = start("--text_column", "text", *flags[2:], "--test_file", "other.csv", "--output_dir", "two").wait()
    refused.assert_one_line(2, "no column 'text'", r"text\x1b[31m")
    unknown = start(*flags, "--test_file", "other.csv", "--output_dir", "three").wait()
    unknown.assert_one_line(2, r"test has labels ['\x1b[31mx']")
    shown = "".join(each.out + each.err for each in (run, refused, unknown))
    assert "[31m" not in shown.replace(r"\x1b[31m", "") and "\x07" not in shown and "long" * 50 not in shown


# ------------------------------------------------------------------------------------------------------ stray quotes
STRAY = ["a film\t1", '"so dull\t0', "a plot\t1", 'so fine"\t1', "so so\t0"]


@pytest.mark.parametrize("name", ["rows.tsv", "rows.csv", "rows.tsv.gz"])
def test_rows_between_two_stray_quotes(tmp_path, caplog, name):
    separator = "," if "csv" in name else "\t"
    lines = "\n".join(line.replace("\t", separator) for line in ["text\tlabel", *STRAY]) + "\n"
    (tmp_path / name).write_bytes(gzip.compress(lines.encode()) if name.endswith("gz") else lines.encode())
    assert len(load(tmp_path / name)) == 3
    assert len(caplog.messages) == 2 and "5 lines hold 3 rows" in caplog.messages[0]
    assert "row 1:" in caplog.messages[0] and "--quoting none" in caplog.messages[0]
    caplog.clear()
    rows = load(tmp_path / name, quoting="none")
    assert rows["text"][:] == [line.split("\t")[0] for line in STRAY] and not caplog.messages


def test_quotes_in_the_middle_of_a_field_are_plain(tmp_path, caplog):
    rows = load(write(tmp_path / "rows.tsv", ['a "film"\t1', "it's 5\" tall\t0", 'a "\t1'], "text\tlabel"))
    assert rows["text"][:] == ['a "film"', "it's 5\" tall", 'a "'] and not caplog.messages


# ----------------------------------------------------------------------------------------------------------- folders
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_shards_of_a_folder_are_one_split(tmp_path, capsys, kind):
    for shard in range(3):
        table = pd.DataFrame({"text": [f"{shard} a", f"{shard} b"], "label": ["01", "2"]})
        file = tmp_path / f"train-0000{shard}-of-00003.{kind}"
        if kind == "jsonl":
            table.to_json(file, orient="records", lines=True)
        else:
            getattr(table, f"to_{kind}")(file, index=False)
    splits = load_splits(DataArguments(dataset_name=str(tmp_path), validation_fraction=0.5))
    texts = splits["train"]["text"][:] + splits["validation"]["text"][:]
    assert sorted(texts) == ["0 a", "0 b", "1 a", "1 b", "2 a", "2 b"]
    assert splits["train"].features["labels"].names == ["01", "2"]
    assert f"train is read from ['train-00000-of-00003.{kind}', 'train-00001-" in capsys.readouterr().out


@pytest.mark.parametrize("others", [["train_old.csv"], ["old/train.csv"], ["train-00000-of-00002.csv"]])
def test_several_files_of_a_split_are_refused(tmp_path, others):
    for name in ["train-00000-of-00001.csv", "test.csv", *others]:
        write(tmp_path / name, ["a,0", "b,1"])
    with pytest.raises(UserError, match="several files for train") as error:
        load_splits(DataArguments(dataset_name=str(tmp_path)))
    assert os.path.basename(others[0]) in str(error.value)


def write_kind(file, table):
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".jsonl":
        pd.DataFrame(table).to_json(file, orient="records", lines=True)
    else:
        getattr(pd.DataFrame(table), f"to_{file.suffix[1:]}")(file, index=False)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("by", ["file", "folder"])
def test_path_with_brackets_and_a_file_changed_under_its_old_time(tmp_path, kind, by):
    folder = tmp_path / "da[t]a [1] *?"
    train, test = (folder / f"{split}.{kind}" for split in ("train", "test"))
    decoy = tmp_path / "data 1 xx" / f"train.{kind}"  # what the name would mean as a pattern
    flags = {"dataset_name": str(folder)} if by == "folder" else {"train_file": str(train), "test_file": str(test)}
    for texts in (["a", "b"], ["c", "d"]):
        for file in (train, test, decoy):
            write_kind(file, {"text": ["x", "y"] if file == decoy else texts, "label": [0, 1]})
            os.utime(file, (1e9, 1e9))
        for rows in load_splits(DataArguments(**flags)).values():
            assert rows["text"][:] == texts


def test_configurations_of_one_file_are_read_apart(tmp_path):
    """The folder's README.md draws two data sets from the same file: the second is not the first, from the cache."""
    rows = {"text": [f"text {i}" for i in range(10)], "label": [0, 1] * 5, "lang": ["en"] * 6 + ["de"] * 4}
    pd.DataFrame(rows).to_parquet(tmp_path / "all.parquet")
    lines = ["---", "configs:"]
    for lang in ("en", "de"):
        lines += [f"- config_name: {lang}", "  data_files: all.parquet", f'  filters: [[lang, "==", {lang}]]']
    (tmp_path / "README.md").write_text("\n".join([*lines, "---", ""]))
    for lang, texts in (("en", rows["text"][:6]), ("de", rows["text"][6:])):
        args = DataArguments(dataset_name=str(tmp_path), dataset_config_name=lang, validation_fraction=0.5)
        splits = load_splits(args)
        assert sorted(splits["train"]["text"][:] + splits["validation"]["text"][:]) == texts


# ------------------------------------------------------------------------------------------------------------- order
def test_class_order_is_the_same_in_every_process(tmp_path):
    """It would be one of 48, if it were that of a set, which the hash seed decides."""
    rows = load(write(tmp_path / "rows.csv", [f"a film,{name}" for name in ("1", "2", "001", "02", "01", "0001")]))
    assert rows.features["labels"].names == ["0001", "001", "01", "1", "02", "2"]


# -------------------------------------------------------------------------------------------------------------- size
def test_a_large_file_is_streamed_and_read_from_the_cache_again(start, tmp_path):
    rows = 20_000
    text = "a film " * 600  # 4 kB
    with (tmp_path / "rows.csv").open("w") as file:
        file.write("text,label\n")
        file.writelines(f"{row} {text},{row % 2}\n" for row in range(rows))
    flags = ("--train_file", "rows.csv", "--validation_fraction", "0.1", "--max_train_samples", "100")
    size = (tmp_path / "rows.csv").stat().st_size / 2**20
    for name in ("first", "second"):
        run = start(*flags, "--output_dir", name, prelude="show_memory.py").wait(timeout=300)
        assert run.status == 0 and f"train: 100 of {rows} rows" in run.out, run.err
        assert ("Generating" in run.err) == (name == "first")
    # in the first run the pages of the cache's files, just written, count as its memory
    assert int(re.search(r"^GROWN (\d+)", run.out, re.M)[1]) < 0.75 * size


# ------------------------------------------------------------------------------------------------------ random files
WORDS = ["film", "très", "很好", '"', 'so "fine"', ",", "\t", "\n", "\r\n", "\r", "\0", "007", "12.50", "null", "'"]
WORDS += ["\\", "\u2028", "\ufeff", "NaN", "=1+1", "[", "{", "#", " ", ";", "\x1b[31m", "é", "😀"]
CLASSES = [["0", "1"], ["01", "1", "2"], ["1.0", "2.0", "3"], ["good", " good", "bad"], ["True", "False"], ["-1", "1"]]
CLASSES += [["None", "NA", "nan"], ["10", "9", "x"], ["1e3", "1000"], ["2024-01-31", "2024-02-01"]]
CLASSES += [['"', "a\nb", "c,d"]]
JSON_CLASSES = [[0, 1], [True, False], ["1", 2], [1.0, 2, "3"], ["a", "b", None], [float("nan"), 1, 2], ["01", "1", 1]]
ODD = ["text", "label", "unused", "Text", " text", "", "label ", "a,b", "té\nxt", "0", "text", "\0"]


def make_text(rng):
    return "".join(rng.choices(WORDS, k=rng.randint(0, 6)))


def make_csv(rng, separator):
    """Bytes of a csv file: most are well-formed, some have a stray quote, a ragged row or two columns of a name."""
    header = ["text", "label", *rng.sample(ODD, rng.randint(0, 2))]
    rng.shuffle(header)
    labels = rng.choice(CLASSES)
    rows = [
        [rng.choice(labels) if name == "label" and rng.random() < 0.95 else make_text(rng) for name in header]
        if rng.random() < 0.3
        else [rng.choice(labels) if name == "label" else make_text(rng) or "x" for name in header]
        for _ in range(rng.randint(2, 30))
    ]
    end = rng.choice(["\n", "\r\n"])
    lines = []
    for row in [header, *rows]:
        quoted = ['"' + value.replace('"', '""') + '"' for value in row]
        plain = [re.search(f'[{separator}"\r\n]', value) is None and rng.random() < 0.8 for value in row]
        fields = zip(row, quoted, plain, strict=True)
        lines.append(separator.join(value if bare else quotes for value, quotes, bare in fields))
        lines += [""] * (rng.random() < 0.03)
    if rng.random() < 0.3:
        spoilt = rng.choice(['"', separator, '"a" b', "a" + separator, 'a"'])
        lines.insert(rng.randint(1, len(lines)), spoilt)
    content = end.join(lines) + end * rng.randint(0, 2)
    return content.encode(rng.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig"]))


def make_json(rng, as_list):
    labels = rng.choice(JSON_CLASSES)
    rows = []
    for _ in range(rng.randint(2, 30)):
        row = {"label": rng.choice(labels), "text": make_text(rng) or "x"}
        row |= {name: rng.choice([None, 1, "late", [1], {"a": 1}]) for name in rng.sample(ODD[2:], rng.randint(0, 2))}
        if rng.random() < 0.008:
            row["text"] = rng.choice([None, 3, "\ud800", ["a"]])
        if rng.random() < 0.008:
            row["label"] = rng.choice([1.5, [1], {"a": 1}, None])
        if rng.random() < 0.008:
            del row[rng.choice(["text", "label"])]
        rows.append(row)
    ascii_only = rng.random() < 0.5 or "\ud800" in [row.get("text") for row in rows]
    dumped = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    if as_list:
        content = f"[{', '.join(dumped)}]"
    else:
        content = rng.choice(["\n", "\r\n", "\n\n"]).join(dumped) + "\n" * rng.randint(0, 2)
    return content.encode(rng.choice(["utf-8", "utf-8", "utf-8-sig"]))


def read_by_csv(file, separator):
    """Text and label of each row, by Python's csv; `ValueError` where rows and header do not agree."""
    with file.open(newline="", encoding="utf-8-sig") as stream:
        header, *rows = [row for row in csv.reader(stream, delimiter=separator, strict=True) if row]
    if any(len(row) != len(header) for row in rows) or header.count("text") != 1 or header.count("label") != 1:
        raise ValueError("ragged")
    for row in rows:
        row = dict(zip(header, row, strict=True))
        whole = re.fullmatch(r"(-?\d+)\.0", row["label"])
        yield row["text"], whole[1] if whole else row["label"].strip() or None


def read_by_json(file):
    text = file.read_text(encoding="utf-8-sig")
    lines = filter(None, text.split("\n"))
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in lines]
    if not all(any(name in row for row in rows) for name in ("text", "label")):
        raise ValueError("no such column")
    for row in rows:
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, (str, type(None))) or isinstance(label, (list, dict)) or label == 1.5:
            raise ValueError("no text, or no class")
        (text or "").encode()  # `UnicodeError`, where no file could hold it
        whole = isinstance(label, float) and label == label
        yield text, None if label is None or label != label else str(int(label) if whole else label)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl"])
def test_random_file_is_read_as_python_reads_it(tmp_path, kind, seed):
    rng = random.Random(f"{kind} {seed}")
    file = tmp_path / f"rows.{kind}"
    separator = {"csv": ",", "tsv": "\t"}.get(kind)
    file.write_bytes(make_csv(rng, separator) if separator else make_json(rng, kind == "json"))
    try:
        rows = list(read_by_csv(file, separator) if separator else read_by_json(file))
    except (ValueError, csv.Error):
        rows = []
    wanted = [(row, *both) for row, both in enumerate(rows) if both[1] and (both[0] or "").strip()]
    if len({label for _, _, label in wanted}) < 2:
        with pytest.raises(UserError):
            load(file)
        return
    read = load(file)
    assert list(zip(read["row"], read["text"], labels_of(read), strict=True)) == wanted
