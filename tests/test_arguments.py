"""The defaults are the recipe; mistakes in flags end in one line."""

import pytest
import torch
import transformers
from transformers import TrainingArguments

from train_rdrop import RDropArguments, parse_args

RECIPE = {
    "model_name_or_path": "FacebookAI/roberta-base",
    "dataset_name": "stanfordnlp/imdb",
    "train_file": None,
    "validation_split": "validation",
    "test_split": "test",
    "text_column": "text",
    "text_pair_column": None,
    "label_column": "label",
    "positive_label": None,
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
        (True, ["--no_fp16"], False, False),
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


def test_every_field_of_ours_has_a_help_text():
    for name in RDropArguments.__annotations__:
        assert RDropArguments.__dataclass_fields__[name].metadata["help"], name


def test_import_starts_nothing(start):
    run = start(prelude="import_only.py").wait()
    assert run.status == 0, run.err


MISTAKES = {  # flags, and what the line must say
    "--learnin_rate 1": "unknown arguments: --learnin_rate. --help lists all.",
    "--learning_rat 1": "unknown arguments: --learning_rat. ",
    "--learning_rat=1 --sed 2": "unknown arguments: --learning_rat, --sed. ",
    "--seed 1 stray": "unknown arguments: a stray word. ",
    "--seed": "expected one argument",
    "--rdrop_alpha five": "argument --rdrop_alpha/--rdrop-alpha: invalid float value: 'five'",
    "--rdrop_alpha -1": "(--rdrop_alpha) must be finite and at least 0, not -1.0",
    "--rdrop_alpha nan": "(--rdrop_alpha) must be finite and at least 0, not nan",
    "--label_smoothing_factor 1": "(--label_smoothing_factor) must be in [0, 1), not 1.0",
    "--label_smoothing_factor -0.1": "(--label_smoothing_factor) must be in [0, 1), not -0.1",
    "--validation_fraction 1": "test_size=1.0 should be",
    "--validation_fraction -0.5": "test_size=-0.5 should be",
    "--max_length 0": "--max_length must be more than 0, not 0",
    "--max_length 2": "--max_length leaves no room beside the special tokens",
    "--max_train_samples 0": "--max_train_samples must be more than 0, not 0",
    "--max_eval_samples -3": "--max_eval_samples must be more than 0, not -3",
    "--gradient_accumulation_steps 0": "--gradient_accumulation_steps must be more than 0, not 0",
    "--num_train_epochs -2": "--num_train_epochs must be more than 0, not -2.0",
    "--per_device_train_batch_size 0": "--per_device_train_batch_size must be more than 0, not 0",
    "--per_device_eval_batch_size 0": "--per_device_eval_batch_size must be more than 0, not 0",
    "--lr_scheduler_type cosinus": "cosinus is not a valid SchedulerType, please select one of",
    "--eval_strategy sometimes": "sometimes is not a valid IntervalStrategy, please select one of",
    "--metric_for_best_model recall": "invalid choice: 'recall' (choose from 'f1', 'accuracy', 'auc', 'loss')",
    "--eval_strategy no": "--load_best_model_at_end requires the save and eval strategy to match",
    "--eval_strategy steps --eval_steps 3 --save_strategy steps --save_steps 6": "--save_steps must equal --eval_steps",
    "--seed -1": "Seed must be between 0 and",
    "--text_column label": "--text_column, --label_column and --text_pair_column must differ",
    "--text_pair_column text": "--text_column, --label_column and --text_pair_column must differ",
    "--validation_split test": "--validation_split and --test_split must differ",
    "--test_file file.csv": "--validation_file and --test_file need a --train_file",
    "--validation_file file.csv": "--validation_file and --test_file need a --train_file",
    "--dataset_name ./not_there": "cannot read ./not_there (",
    "--dataset_name /not/there/either": "cannot read /not/there/either (",
    "--dataset_name imdb": "owner/name",
    "--dataset_name file.csv": "cannot read file.csv (",
    "--dataset_name owner/name": "HF_ENDPOINT",
    "--model_name_or_path ./not_there": "cannot load ./not_there (",
    "--model_name_or_path owner/name": "HF_ENDPOINT",
    "--output_dir file.csv": "file.csv",
    "--output_dir file.csv/below": "file.csv",
    "--logging_dir file.csv": "file.csv",
}
FOUND_WITH_THE_MODEL = {  # by Trainer, which is made after it
    "--report_to tensorbored": "tensorbored is not supported, only",
    "--report_to tensorboard tensorbored": "tensorbored is not supported, only",
    "--report_to wandb": "wandb to be installed",
    "--dataloader_num_workers -1": "num_workers",
    "--batch_eval_metrics": "batch_eval_metrics",
}


@pytest.mark.parametrize("flags", [*MISTAKES, *FOUND_WITH_THE_MODEL])
def test_mistaken_flag_ends_in_one_line(start, tmp_path, flags):
    (tmp_path / "file.csv").write_text("text,label\na,0\n")
    run = start(*flags.split()).wait()
    run.assert_one_line(2, (MISTAKES | FOUND_WITH_THE_MODEL)[flags])
    assert flags in FOUND_WITH_THE_MODEL or "Loading weights" not in run.err
    assert "effective batch" not in run.out, "no step has been taken"
    assert not list(tmp_path.rglob("arguments.json")), "the folder is free for the next try"


def test_help_names_our_flags(start):
    run = start("--help").wait()
    assert run.status == 0 and "--rdrop_alpha" in run.out and "(default: 5.0)" in run.out
    assert "{f1,accuracy,auc,loss}" in run.out
