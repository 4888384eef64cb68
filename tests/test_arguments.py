"""The defaults are the recipe, a mistake is one line and status 2, and tokens and foreign code stay out."""

import io
import json
import sys

import pytest
import tiny_imdb
import torch
import transformers
from conftest import FEW, contents, train
from transformers import TrainingArguments

from train_rdrop import RDropArguments, UserError, parse_args

RECIPE = {
    "model_name_or_path": "FacebookAI/roberta-base",
    "dataset_name": "stanfordnlp/imdb",
    "validation_split": "validation",
    "test_split": "test",
    "validation_fraction": 0.0,
    "text_column": "text",
    "label_column": "label",
    "quoting": "minimal",
    "max_length": 512,
    "rdrop_alpha": 5.0,
    "length_buckets": 1,
    "label_smoothing_factor": 0.1,
    "learning_rate": 2e-5,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 5,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "f1",
    "greater_is_better": True,
    "early_stopping_patience": 3,
    "early_stopping_threshold": 0.01,
    "logging_steps": 50,
    "report_to": ["tensorboard"],
    "output_dir": "./results_rdrop",
    "logging_dir": "./logs_rdrop",
    "seed": 42,
}


@pytest.mark.parametrize("make", [lambda: parse_args([]), RDropArguments], ids=["parse_args", "RDropArguments"])
def test_defaults_are_the_recipe(make):
    args = make()
    assert {name: getattr(args, name) for name in RECIPE} == RECIPE
    assert "adamw" in args.optim and args.get_warmup_steps(1000) == 100
    assert args.model_name_or_path == RECIPE["model_name_or_path"] and args.config_overrides is args.train_file is None


def test_fp16_is_the_default_on_cuda_only(monkeypatch):
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(TrainingArguments, "device", "made up")  # no driver is asked
    for flags, precision in (([], "fp16"), (["--fp16", "false"], "no"), (["--bf16"], "bf16"), (["--use_cpu"], "no")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert parse_args(flags).mixed_precision == precision
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert parse_args(flags).mixed_precision == ("bf16" if precision == "bf16" else "no")


MISTAKES = [  # flags, and what the line must name
    ("--rdrop_alpha five", "--rdrop_alpha"),
    ("--rdrop_alpha -1", "--rdrop_alpha"),
    ("--length_buckets 0", "--length_buckets"),
    ("--metric_for_best_model recall", "--metric_for_best_model"),
    ("--do_train false", "--do_train"),
    ("--validation_split test", "--validation_split"),
    ("--eval_strategy steps --eval_steps 3 --save_strategy steps --save_steps 6", "--save_steps"),
    ("--validation_fraction 1.5", "validation"),
    ("--positive_label good", "--positive_label"),
    ("--max_length 2000 --model_name_or_path short", "--max_length"),
    ("--config_overrides nonsense=1", "nonsense"),
    ("--model_name_or_path ./not_there", "./not_there"),
    ("--dataset_name ./not_there", "./not_there"),
    ("--text_column review", "review"),
    ("--label_column stars", "stars"),
    ("--train_file not_there.csv", "not_there.csv"),
    ("--train_file good.csv", "--validation_fraction"),
    ("--train_file good.csv --test_file notes.txt", "notes.txt"),
    ("--train_file good.csv --test_file latin.csv", "latin.csv"),
    ("--train_file good.csv --test_file broken.jsonl", "broken.jsonl"),
    ("--resume_from_checkpoint last", "last"),
]


@pytest.mark.parametrize("flags, named", MISTAKES, ids=[flags for flags, _ in MISTAKES])
def test_mistake_is_one_line_and_status_2(status_2, argv, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.csv").write_text("text,label\na fine film,1\na dull film,0\n")
    (tmp_path / "latin.csv").write_bytes("text,label\ntrès bien,1\n".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b" "label": 0}\n')
    if "short" in flags:  # 40 positions, and a tokenizer without a limit
        tiny_imdb.write_model("short", max_position_embeddings=42)
        tiny_imdb.make_tokenizer(model_max_length=10**30).save_pretrained("short")
    lines = status_2([*argv, *flags.split()])
    (line,) = [line for line in lines if line.startswith("train_rdrop.py: error:")]
    assert named in line and lines[-1] == line and not any("Traceback" in line for line in lines)
    assert not list(tmp_path.rglob("arguments.json")), "the folder is free for the next try"


# ---- secrets
TOKEN = "hf_made_up_and_secret"


def test_mistyped_flag_is_named_without_its_value(status_2):
    for flags in (["--hub_tokn", TOKEN], [f"--hub_tokn={TOKEN}"], [TOKEN]):
        lines = status_2(flags)
        assert TOKEN not in "\n".join(lines) and ("--hub_tokn" in lines[-1]) == (flags != [TOKEN])


def test_token_is_in_no_file(tmp_path, argv, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "")
    train(tmp_path, *argv, *FEW, "--max_steps", "1", "--hub_token", TOKEN)
    files = contents(tmp_path)
    assert {"training_args.bin", "arguments.json"} <= {path.name for path in files}
    assert [path for path, content in files.items() if TOKEN.encode() in content] == []
    assert TOKEN not in "".join(capfd.readouterr())


def test_code_that_comes_with_a_model_is_not_run(tmp_path, argv, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # to a question that must not be asked
    tiny_imdb.write_model("model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    names = {"AutoConfig": "remote.Config", "AutoModelForSequenceClassification": "remote.Model"}
    config |= {"model_type": "other", "auto_map": names, "architectures": ["Model"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "remote.py").write_text("open('it_ran', 'w')\n")
    with pytest.raises(UserError):
        train(tmp_path, *argv, *FEW, "--model_name_or_path", "model")
    assert not (tmp_path / "it_ran").exists()
