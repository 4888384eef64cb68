"""A Hub served on this machine: model and data come from it, and the result goes to it."""

import os
import subprocess
import sys

import pytest
from conftest import SCRIPT
from local_hub import Hub

TRAIN = "--model_name_or_path owner/tiny-roberta --dataset_name owner/tiny-imdb --num_train_epochs 1 --report_to none"
STARTS = {
    "push": [*TRAIN.split(), "--push_to_hub", "--hub_model_id", "somebody/reviews"],
    "no data": ["--dataset_name", "owner/nothing", "--output_dir", "out1"],
    "no model": ["--dataset_name", "owner/tiny-imdb", "--model_name_or_path", "owner/nothing", "--output_dir", "out2"],
}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """What each of `STARTS`, all at the same time, has written and pushed: (status, stderr, pushed files)."""
    hub = Hub({"models/owner/tiny-roberta": tiny / "model", "datasets/owner/tiny-imdb": tiny / "data"})
    folder = tmp_path_factory.mktemp("hub")
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_made_up", "HF_HOME": str(folder)}
    started = {
        name: subprocess.Popen([sys.executable, SCRIPT, *flags], cwd=folder, env=env, stderr=subprocess.PIPE, text=True)
        for name, flags in STARTS.items()
    }
    ended = {name: (run.communicate()[1], run.returncode) for name, run in started.items()}
    hub.close()
    return {name: (status, err, hub.pushed) for name, (err, status) in ended.items()}


def test_model_and_data_from_the_hub_and_result_to_it(runs):
    status, err, pushed = runs["push"]
    assert status == 0, err
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= pushed["somebody/reviews"].keys()
    assert not any(name.startswith("checkpoint-") for name in pushed["somebody/reviews"])
    card = pushed["somebody/reviews"]["README.md"].decode()
    assert "owner/tiny-imdb" in card and "owner/tiny-roberta" in card and "- F1:" in card and "- Auc:" in card
    assert "R-Drop" in card and "alpha 5.0" in card and "label smoothing 0.1" in card and "hf_made_up" not in card


@pytest.mark.parametrize("what", ["no data", "no model"])
def test_repository_that_is_not_on_the_hub(runs, what):
    status, err, _ = runs[what]
    said = [line for line in err.splitlines() if line.startswith("train_rdrop.py: ")]
    assert status == 2 and len(said) == 1 and "owner/nothing" in said[0] and "Traceback" not in err, err
