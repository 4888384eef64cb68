"""The command of the recipe, `python train_rdrop.py`, which downloads model and data; here a Hub on this machine serves
the tiny ones under their names."""

import os
import subprocess
import sys

from conftest import SCRIPT, read_json
from local_hub import serve


def test_recipe_without_flags_for_model_and_data(tiny, tmp_path):
    folders = {"models/FacebookAI/roberta-base": tiny / "model", "datasets/stanfordnlp/imdb": tiny / "data"}
    env = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    with serve(folders) as endpoint:
        env |= {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf_home")}
        command = [sys.executable, SCRIPT, "--num_train_epochs", "1", "--max_steps", "2"]
        run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    arguments = read_json(tmp_path, "results_rdrop", "arguments.json")
    assert arguments["rows"] == {"train": {"neg": 200, "pos": 200}, "test": {"neg": 50, "pos": 50}}
    assert arguments["model_name_or_path"] == "FacebookAI/roberta-base" and arguments["rdrop_alpha"] == 5.0
    assert "eval_f1" in read_json(tmp_path, "results_rdrop", "all_results.json")
    assert (tmp_path / "results_rdrop" / "model.safetensors").is_file() and any((tmp_path / "logs_rdrop").iterdir())
