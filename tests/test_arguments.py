"""The defaults are the recipe; mistakes in flags and data end in one line."""

import json

import pytest
import torch
import transformers
from conftest import ROOT
from transformers import TrainingArguments

from train_rdrop import RDropArguments, load_splits, parse_args

RECIPE = {
    "model_name_or_path": "FacebookAI/roberta-base",
    "dataset_name": "stanfordnlp/imdb",
    "rdrop_alpha": 5.0,
    "label_smoothing_factor": 0.1,
    "learning_rate": 2e-5,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "num_train_epochs": 5,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "f1",
    "greater_is_better": True,
    "save_total_limit": 2,
    "early_stopping_patience": 3,
    "early_stopping_threshold": 0.01,
    "logging_steps": 50,
    "report_to": ["tensorboard"],
    "logging_dir": "./logs_rdrop",
    "output_dir": "./results_rdrop",
    "seed": 42,
    "validation_fraction": 0.0,
    "max_length": None,
    "max_train_samples": None,
    "max_eval_samples": None,
    "gradient_accumulation_steps": 1,
}


def test_defaults_are_the_recipe():
    args = parse_args([])
    for name, value in RECIPE.items():
        assert getattr(args, name) == value, name
    assert args.optim == TrainingArguments().optim and "adamw" in args.optim
    assert args.get_warmup_steps(1000) == 100


@pytest.mark.parametrize(
    "cuda, flags, fp16, bf16",
    [
        (True, [], True, False),
        (True, ["--fp16", "false"], False, False),
        (True, ["--no_fp16"], False, False),
        (True, ["--bf16"], False, True),
        (True, ["--bf16", "--fp16"], False, True),
        (True, ["--use_cpu"], False, False),
        (False, [], False, False),
        (False, ["--use_cpu", "--bf16"], False, True),
    ],
)
def test_fp16_is_on_where_cuda_is(monkeypatch, cuda, flags, fp16, bf16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: cuda)
    monkeypatch.setattr(TrainingArguments, "device", "made up")  # no driver is asked
    args = parse_args(flags)
    assert (args.fp16, args.bf16) == (fp16, bf16)
    assert args.mixed_precision == ("fp16" if fp16 else "bf16" if bf16 else "no")


def test_every_field_of_ours_has_a_help_text():
    for name in RDropArguments.__annotations__:
        assert RDropArguments.__dataclass_fields__[name].metadata["help"], name


def test_import_starts_nothing(start):
    code = f"""
import os, random, sys
import datasets, numpy, sklearn.metrics, torch, transformers  # which do set variables of their own
transformers.Trainer, transformers.EarlyStoppingCallback, transformers.integrations.TensorBoardCallback
state = lambda: (dict(os.environ), torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()))
before = state()
sys.path.insert(0, {str(ROOT)!r})
files = os.listdir()
import train_rdrop
assert state() == before and os.listdir() == files
sys.exit()
"""
    run = start(prelude=code).wait()
    assert run.status == 0, run.err


MISTAKES = {
    "--learnin_rate 1": "--learnin_rate",
    "--learning_rat 1": "--learning_rat",
    "stray": "stray",
    "--rdrop_alpha five": "rdrop_alpha",
    "--rdrop_alpha -1": "rdrop_alpha",
    "--rdrop_alpha nan": "rdrop_alpha",
    "--label_smoothing_factor 1": "label_smoothing_factor",
    "--label_smoothing_factor -0.1": "label_smoothing_factor",
    "--validation_fraction 1": "validation_fraction",
    "--validation_fraction -0.5": "validation_fraction",
    "--max_length 0": "max_length",
    "--max_length 2": "max_length",
    "--max_train_samples 0": "max_train_samples",
    "--max_eval_samples -3": "max_eval_samples",
    "--early_stopping_patience -1": "early_stopping_patience",
    "--lr_scheduler_type cosinus": "cosinus",
    "--eval_strategy sometimes": "sometimes",
    "--metric_for_best_model recall": "recall",
    "--report_to tensorbored": "tensorbored",
    "--per_device_train_batch_size 0": "per_device_train_batch_size",
    "--eval_strategy no": "eval",
    "--seed -1": "seed",
    "--dataloader_num_workers -1": "dataloader_num_workers",
    "--report_to wandb": "tensorboard",
    "--text_column label": "are both label",
    "--batch_eval_metrics": "batch_eval_metrics",
    "--report_to tensorboard tensorbored": "tensorbored",
    "--dataset_name ./not_there": "./not_there",
    "--dataset_name /not/there/either": "/not/there/either",
    "--dataset_name imdb": "owner/name",
    "--dataset_name file.csv": "file.csv",
    "--model_name_or_path ./not_there": "./not_there",
    "--dataset_name owner/name": "HF_ENDPOINT",
    "--model_name_or_path owner/name": "HF_ENDPOINT",
    "--text_column review": "only ['text', 'label']",
    "--label_column stars": "only ['text', 'label']",
    "--output_dir file.csv": "file.csv",
    "--output_dir file.csv/below": "file.csv",
    "--logging_dir file.csv": "file.csv",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistaken_flag_ends_in_one_line(start, tmp_path, flags):
    (tmp_path / "file.csv").write_text("text,label\na,0\n")
    run = start(*flags.split()).wait()
    assert run.status == 2, run.err
    assert len(run.said) == 1 and MISTAKES[flags] in run.said[0], run.err
    assert "Traceback" not in run.err
    if "model" not in flags:
        assert "Loading weights" not in run.err


GOOD = ["a fine film,1", "a dull film,0", "so fine,1", "so dull,0"]
DATA = {  # what is wrong: files of the folder, and what the line must say
    "no test split": ({"train.csv": GOOD}, ["'test'", "train"]),
    "no data files": ({"notes.md": []}, ["data"]),
    "empty split": ({"train.csv": GOOD, "test.csv": []}, ["empty"]),
    "empty train split": ({"train.csv": [], "test.csv": GOOD}, ["empty"]),
    "ragged csv": ({"train.csv": [*GOOD, "a,b,c,d"], "test.csv": GOOD}, ["Expected 2 fields"]),
    "missing text": ({"train.csv": [*GOOD, ",1", ",0"], "test.csv": GOOD}, ["2 of 6", "'text'", "row 4"]),
    "blank text": ({"train.csv": GOOD, "test.csv": [*GOOD, "   ,1"]}, ["1 of 5", "'text'", "row 4", "'test'"]),
    "texts are numbers": ({"train.csv": ["1,0", "2,1"], "test.csv": ["1,0", "2,1"]}, ["2 of 2", "not a string"]),
    "missing label": ({"train.csv": [*GOOD, "so so,"], "test.csv": GOOD}, ["1 of 5", "'label'", "missing", "row 4"]),
    "labels from 1": ({"train.csv": ["a,1", "b,2"], "test.csv": ["a,1", "b,2"]}, ["1 of 2", "'label'", "0 to 1"]),
    "label -1": ({"train.csv": ["a,-1", "b,1"], "test.csv": GOOD}, ["'label'", "0 to 1"]),
    "unknown label in test": ({"train.csv": GOOD, "test.csv": ["a,0", "b,7"]}, ["'test'", "row 1", "'7'"]),
    "unknown name in test": ({"train.csv": ["a,good", "b,bad"], "test.csv": ["a,ugly"]}, ["'ugly'", "'bad' to 'good'"]),
    "fractions as labels": ({"train.csv": ["a,0.5", "b,1.5"], "test.csv": ["a,0.5"]}, ["integers 0..n-1 or strings"]),
    "no AUC to choose by": ({"train.csv": GOOD, "test.csv": GOOD[::2]}, ["--metric_for_best_model auc is undefined"]),
    "one label only": ({"train.csv": ["a,0", "b,0"], "test.csv": GOOD}, ["one label only"]),
    "other columns": ({"train.csv": GOOD, "test.jsonl": ['{"text": "a"}']}, []),
}


@pytest.mark.parametrize("what", DATA)
def test_mistaken_data_ends_in_one_line(start, tmp_path, what):
    files, words = DATA[what]
    (tmp_path / "data").mkdir()
    for name, lines in files.items():
        header = ["text,label"] if name.endswith(".csv") else []
        (tmp_path / "data" / name).write_text("\n".join(header + lines) + "\n")
    run = start("--dataset_name", "data", *(["--metric_for_best_model", "auc"] if "AUC" in what else [])).wait()
    assert run.status == 2, run.err
    assert len(run.said) == 1 and all(word in run.said[0] for word in words), run.err
    assert "Traceback" not in run.err and "Loading weights" not in run.err


def test_validation_part_too_small_to_be_stratified(start, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train.csv", "test.csv"):
        (tmp_path / "data" / name).write_text("text,label\n" + "\n".join(GOOD))
    run = start("--dataset_name", "data", "--validation_fraction", "0.1").wait()
    assert run.status == 2 and "--validation_fraction" in run.said[0] and len(run.said) == 1, run.err


@pytest.fixture
def load(argv, tmp_path):
    return lambda *flags: load_splits(parse_args([str(flag) for flag in [*argv, "--report_to", "none", *flags]]))


def test_validation_part_is_held_out_stratified_and_drawn_with_the_seed(load):
    whole = load()
    assert list(whole) == ["train", "test"]
    held = load("--validation_fraction", "0.1")
    assert {split: len(rows) for split, rows in held.items()} == {"train": 360, "validation": 40, "test": 100}
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


@pytest.mark.parametrize(
    "labels, names, ids",
    [
        (["good", "bad", "so so"], ["bad", "good", "so so"], [1, 0, 2]),
        ([2, 0, 1], ["0", "1", "2"], [2, 0, 1]),
        ([True, False], ["False", "True"], [1, 0]),
    ],
)
def test_labels_of_each_kind(load, tmp_path, labels, names, ids):
    rows = "\n".join(json.dumps({"length": f"text {i}", "stars": label, "labels": i, "text": None}) for i, label in enumerate(labels))
    for split in ("train", "test", "unsupervised"):
        (tmp_path / f"{split}.jsonl").write_text(rows)
    splits = load("--dataset_name", tmp_path, "--text_column", "length", "--label_column", "stars")
    assert list(splits) == ["train", "test"]
    for rows in splits.values():
        assert rows.features["labels"].names == names and rows["labels"][:] == ids


def test_help_names_our_flags(start):
    run = start("--help").wait()
    assert run.status == 0 and "--rdrop_alpha" in run.out and "(default: 5.0)" in run.out
