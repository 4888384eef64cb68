"""A Hub served on this machine: model and data come from it, and the result goes to it."""

import os
import subprocess
import sys

import pytest
from conftest import SCRIPT
from local_hub import Hub


@pytest.fixture
def hub(tiny):
    hub = Hub({"models/owner/tiny-roberta": tiny / "model", "datasets/owner/tiny-imdb": tiny / "data"})
    yield hub
    hub.close()


def start(hub, folder, *flags):
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_made_up", "HF_HOME": str(folder / "hf")}
    return subprocess.run([sys.executable, SCRIPT, *flags], cwd=folder, env=env, capture_output=True, text=True)


def test_model_and_data_from_the_hub_and_result_to_it(hub, tmp_path):
    flags = "--model_name_or_path owner/tiny-roberta --dataset_name owner/tiny-imdb --num_train_epochs 1 --learning_rate 1e-3"
    run = start(hub, tmp_path, *flags.split(), "--push_to_hub", "--hub_model_id", "somebody/reviews", "--report_to", "none")
    assert run.returncode == 0, run.stderr
    pushed = hub.pushed["somebody/reviews"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= pushed.keys()
    assert not any(name.startswith("checkpoint-") for name in pushed)
    card = pushed["README.md"].decode()
    assert "owner/tiny-imdb" in card and "owner/tiny-roberta" in card and "- F1:" in card and "- Auc:" in card
    assert "R-Drop" in card and "alpha 5.0" in card and "label smoothing 0.1" in card and "hf_made_up" not in card


def test_repository_that_is_not_on_the_hub(hub, tmp_path, tiny):
    for flags, name in ((("--dataset_name", "owner/nope"), "owner/nope"), (("--dataset_name", tiny / "data", "--model_name_or_path", "owner/none"), "owner/none")):
        run = start(hub, tmp_path, *map(str, flags))
        said = [line for line in run.stderr.splitlines() if line.startswith("train_rdrop.py: ")]
        assert run.returncode == 2 and len(said) == 1 and name in said[0] and "Traceback" not in run.stderr, run.stderr
