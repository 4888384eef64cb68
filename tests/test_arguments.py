"""The defaults are the recipe; mistakes in flags end in one line, before anything slow starts."""

import re

import pytest
import torch
import transformers
from transformers import TrainingArguments

import train_rdrop
from train_rdrop import DataArguments, MethodArguments, ModelArguments, TrainingFlags, parse_args

RECIPE = {
    "model_name_or_path": "FacebookAI/roberta-base",
    "config_overrides": None,
    "dataset_name": "stanfordnlp/imdb",
    "train_file": None,
    "quoting": "minimal",
    "validation_split": "validation",
    "test_split": "test",
    "text_column": "text",
    "text_pair_column": None,
    "label_column": "label",
    "positive_label": None,
    "rdrop_alpha": 5.0,
    "length_buckets": 1,
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
    "max_length": 512,
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


def pretend(monkeypatch, cuda):
    """This machine has CUDA, or has not; no driver is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: cuda)
    monkeypatch.setattr(TrainingArguments, "device", "made up")


@pytest.mark.parametrize(
    "cuda, flags, fp16, bf16",
    [
        (True, [], True, False),
        (True, ["--fp16", "false"], False, False),
        (True, ["--bf16"], False, True),
        (True, ["--bf16", "--fp16"], False, True),
        (True, ["--use_cpu"], False, False),
        (False, [], False, False),
        (False, ["--use_cpu", "--bf16"], False, True),
    ],
)
def test_fp16_is_on_where_cuda_is(monkeypatch, cuda, flags, fp16, bf16):
    pretend(monkeypatch, cuda)
    args = parse_args(flags)
    assert (args.fp16, args.bf16) == (fp16, bf16)
    assert args.mixed_precision == ("fp16" if fp16 else "bf16" if bf16 else "no")


@pytest.mark.parametrize(
    "cuda, flags, workers",
    [(True, [], 2), (True, ["--dataloader_num_workers", "0"], 0), (True, ["--use_cpu"], 0), (False, [], 0)],
)
def test_processes_make_batches_where_cuda_is(monkeypatch, cuda, flags, workers):
    pretend(monkeypatch, cuda)
    assert parse_args(flags).dataloader_num_workers == workers


def test_curves_go_to_several_places_or_none():
    assert parse_args(["--report_to", "tensorboard", "trackio"]).report_to == ["tensorboard", "trackio"]
    assert parse_args(["--report_to", "none"]).report_to == []


def test_import_starts_nothing(start):
    run = start(prelude="import_only.py").wait()
    assert run.status == 0, run.err


MISTAKES = {  # flags, and what the line must say
    "--learnin_rate 1": "unknown arguments: --learnin_rate",
    "--learning_rat 1": "unknown arguments: --learning_rat",
    "--learning_rat=1 --sed 2": "unknown arguments: --learning_rat, --sed",
    "--seed 1 stray": "unknown arguments: a stray word",
    "--seed": "expected one argument",
    "--rdrop_alpha five": "argument --rdrop_alpha/--rdrop-alpha: invalid float value: 'five'",
    "--rdrop_alpha -1": "(--rdrop_alpha) must be finite and at least 0, not -1.0",
    "--rdrop_alpha nan": "(--rdrop_alpha) must be finite and at least 0, not nan",
    "--label_smoothing_factor 1": "(--label_smoothing_factor) must be in [0, 1), not 1.0",
    "--label_smoothing_factor -0.1": "(--label_smoothing_factor) must be in [0, 1), not -0.1",
    "--length_buckets 0": "--length_buckets must be more than 0, not 0",
    "--max_length 0": "--max_length must be more than 0, not 0",
    "--max_train_samples 0": "--max_train_samples must be more than 0, not 0",
    "--max_eval_samples -3": "--max_eval_samples must be more than 0, not -3",
    "--gradient_accumulation_steps 0": "--gradient_accumulation_steps must be more than 0, not 0",
    "--num_train_epochs -2": "--num_train_epochs must be more than 0, not -2.0",
    "--per_device_train_batch_size 0": "--per_device_train_batch_size must be more than 0, not 0",
    "--per_device_eval_batch_size 0": "--per_device_eval_batch_size must be more than 0, not 0",
    "--eval_accumulation_steps 0": "--eval_accumulation_steps must be more than 0, not 0",
    "--seed -1": "--seed must be in [0, 2 ** 32), not -1",
    "--seed 5000000000": "--seed must be in [0, 2 ** 32), not 5000000000",
    "--dataloader_num_workers -1": "--dataloader_num_workers must be at least 0, not -1",
    "--early_stopping_patience -1": "--early_stopping_patience must be at least 0, not -1",
    "--learning_rate -1": "--learning_rate must be at least 0, not -1.0",
    "--quoting all": "invalid choice: 'all' (choose from 'minimal', 'none')",
    "--lr_scheduler_type cosinus": "invalid choice: 'cosinus' (choose from 'linear', 'cosine'",
    "--eval_strategy sometimes": "invalid choice: 'sometimes' (choose from 'no', 'steps', 'epoch')",
    "--metric_for_best_model recall": "invalid choice: 'recall' (choose from 'accuracy', 'f1', 'auc', 'loss')",
    "--eval_strategy no": "--load_best_model_at_end requires the save and eval strategy to match",
    "--eval_strategy steps --eval_steps 3 --save_strategy steps --save_steps 6": "--save_steps must equal --eval_steps",
    "--text_column label": "--text_column, --label_column and --text_pair_column must differ",
    "--text_pair_column text": "--text_column, --label_column and --text_pair_column must differ",
    "--validation_split test": "--validation_split and --test_split must differ",
    "--test_file file.csv": "--validation_file and --test_file need a --train_file",
    "--validation_file file.csv": "--validation_file and --test_file need a --train_file",
}
REFUSED = {  # a run trains, and its metrics need all labels and logits
    "--do_train false": "--do_train",
    "--do_eval": "--do_eval",
    "--do_predict": "--do_predict",
    "--prediction_loss_only": "--prediction_loss_only",
    "--eval_do_concat_batches false": "--eval_do_concat_batches",
    "--no_eval_do_concat_batches": "--eval_do_concat_batches",
    "--batch_eval_metrics": "--batch_eval_metrics",
    "--label_names labels": "--label_names",
    "--debug underflow_overflow": "--debug",
    "--remove_unused_columns false": "--remove_unused_columns",
    "--dataloader_drop_last": "--dataloader_drop_last",
    "--greater_is_better false": "--greater_is_better",
    "--metric_for_best_model loss --greater_is_better true": "--greater_is_better",
}
RENAMED = {
    "--warmup_ratio 0.06": "--warmup_ratio is now --warmup_steps",
    "--warmup_ratio=0.06 --seed 1": "--warmup_ratio is now --warmup_steps",
    "--evaluation_strategy steps": "--evaluation_strategy is now --eval_strategy",
    "--group_by_length": "--group_by_length is now --train_sampling_strategy group_by_length",
    "--no_cuda": "--no_cuda is now --use_cpu",
}


@pytest.mark.parametrize("flags", [*MISTAKES, *REFUSED, *RENAMED])
def test_mistaken_flag_ends_in_usage_and_one_line(capsys, flags):
    with pytest.raises(SystemExit) as end:
        parse_args(["--use_cpu", *flags.split()])
    usage, line = capsys.readouterr().err.split("\n", 1)
    assert end.value.code == 2 and usage.startswith("usage: ") and " error: " in line
    assert (MISTAKES | REFUSED | RENAMED)[flags] in line and len(line) < 500


def test_all_refused_and_renamed_flags_are_tested():
    assert {f"--{name}" for name in train_rdrop.FIXED} == set(REFUSED.values())
    assert train_rdrop.RENAMED.keys() == {re.split("[ =]", flags)[0] for flags in RENAMED}


def test_default_values_of_refused_flags_are_taken():
    flags = ["--do_train", "--do_eval", "false", "--prediction_loss_only", "false", "--remove_unused_columns", "true"]
    args = parse_args([*flags, "--eval_do_concat_batches", "true"])
    assert args.remove_unused_columns and args.eval_do_concat_batches and not args.prediction_loss_only


@pytest.mark.parametrize("flags", ["--do_predict", "--warmup_ratio 0.1", "--rdrop_alpha -1"])
def test_nothing_starts_before_a_mistaken_flag_is_refused(start, tmp_path, flags):
    run = start(*flags.split()).wait()
    run.assert_one_line(2, "train_rdrop.py: error: ", flags.split()[0])
    assert run.out == "" and len(run.err.splitlines()) == 2 and run.err.startswith("usage: train_rdrop.py ")
    assert {path.name for path in tmp_path.iterdir()} == {"run0.out", "run0.err"}


FOUND_BEFORE_THE_MODEL = {  # in files and folders
    "--validation_fraction 1": "--validation_fraction",
    "--validation_fraction -0.5": "--validation_fraction",
    "--max_length 2": "--max_length leaves no room beside the special tokens",
    "--dataset_name ./not_there": "./not_there",
    "--dataset_name /not/there/either": "/not/there/either",
    "--dataset_name imdb": "owner/name",
    "--dataset_name file.csv": "file.csv",
    "--dataset_name owner/name": "HF_ENDPOINT",
    "--model_name_or_path ./not_there": "./not_there",
    "--model_name_or_path owner/name": "HF_ENDPOINT",
    "--output_dir file.csv": "file.csv",
    "--output_dir file.csv/below": "file.csv",
    "--logging_dir file.csv": "file.csv",
}
FOUND_WITH_THE_MODEL = {  # by Trainer, which is made after it
    "--report_to tensorbored": "tensorbored is not supported, only",
    "--report_to tensorboard tensorbored": "tensorbored is not supported, only",
    "--report_to wandb": "wandb to be installed",
    "--config_overrides nonsense=1": "nonsense",
    "--config_overrides nonsense": "--config_overrides",
    "--config_overrides hidden_dropout_prob=much": "--config_overrides",
}


@pytest.mark.parametrize("flags", [*FOUND_BEFORE_THE_MODEL, *FOUND_WITH_THE_MODEL])
def test_what_the_flags_name_is_checked_before_training(start, tmp_path, flags):
    (tmp_path / "file.csv").write_text("text,label\na,0\n")
    run = start(*flags.split()).wait()
    run.assert_one_line(2, "train_rdrop.py: error: ", (FOUND_BEFORE_THE_MODEL | FOUND_WITH_THE_MODEL)[flags])
    assert flags in FOUND_WITH_THE_MODEL or "new weights" not in run.out
    assert "effective batch" not in run.out, "no step has been taken"
    assert not list(tmp_path.rglob("arguments.json")), "the folder is free for the next try"


def test_help_begins_with_our_flags_in_groups(start):
    run = start("--help").wait()
    lines = run.out.splitlines()
    assert run.status == 0 and lines[0].startswith("usage: train_rdrop.py ") and lines[1] == "", run.out[:500]
    titles = [group._argument_group_name for group in (ModelArguments, DataArguments, MethodArguments, TrainingFlags)]
    places = [lines.index(f"{title}:") for title in titles]
    assert places == sorted(places) and places[0] < 10 and places[3] < 100
    assert lines.index(next(line for line in lines if line.startswith("  --rdrop_alpha"))) < places[3]
    assert lines.index(next(line for line in lines if line.startswith("  --learning_rate"))) > places[3]
    assert re.search(r"--rdrop_alpha.*?Weight of the KL term.*?\(default:\s+5.0\)", run.out, re.S)
    assert re.search(r"--learning_rate.*?\(default:\s+2e-05\)", run.out, re.S), "the recipe's, not TrainingArguments'"


def test_every_flag_of_ours_has_a_help_text():
    for group in (ModelArguments, DataArguments, MethodArguments):
        for name in group.__annotations__:
            assert group.__dataclass_fields__[name].metadata["help"], name
