"""Start here: the README's tiny run, on whatever this machine has, and what it must leave behind."""

import runpy
import subprocess
import sys
from pathlib import Path

import tiny_imdb
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(__file__).resolve().parent.parent / "train_rdrop.py"
sys.path.insert(0, str(SCRIPT.parent))
FILES = ["model.safetensors", "tokenizer.json", "all_results.json", "eval_results.json", "predictions.csv"]
FILES += ["classification_report.txt", "arguments.json"]
ARGV = ["--model_name_or_path", "tiny/model", "--dataset_name", "tiny/data", "--learning_rate", "1e-3"]
# plain python runs all GPUs, so this keeps the effective batch near 16
ARGV += ["--per_device_train_batch_size", str(max(1, 16 // max(1, torch.cuda.device_count())))]


def test_main_learns_and_writes_what_the_readme_promises(tmp_path, monkeypatch):
    from train_rdrop import main

    monkeypatch.chdir(tmp_path)
    tiny_imdb.write_model("tiny/model")
    tiny_imdb.write_data("tiny/data")
    results = main([*ARGV, "--logging_steps", "10"])
    assert results["eval_f1"] > 0.9
    assert [name for name in FILES if not Path("results_rdrop", name).is_file()] == []
    (logs,) = Path("logs_rdrop").iterdir()
    curves = {tag for file in logs.iterdir() for tag in EventAccumulator(str(file)).Reload().Tags()["scalars"]}
    assert {"train/ce", "train/kl", "eval/f1"} <= curves


def test_script_runs_as_the_readme_starts_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tests/tiny_imdb.py", "tiny"])
    runpy.run_path(tiny_imdb.__file__, run_name="__main__")
    command = [sys.executable, SCRIPT, *ARGV, "--num_train_epochs", "1", "--output_dir", "results_tiny"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [name for name in FILES if not Path("results_tiny", name).is_file()] == []
