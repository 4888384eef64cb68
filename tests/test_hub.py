"""A Hub served on this machine: model and data come from it, and the result goes to it."""

import json
import os
import subprocess
import sys

import pytest
from conftest import PRELUDES, said
from local_hub import Hub

TOKEN = "hf_made_up_and_secret"
TRAIN = ["--model_name_or_path", "owner/tiny-roberta", "--dataset_name", "owner/tiny-imdb", "--num_train_epochs", "1"]
TRAIN += ["--max_train_samples", "64"]
OWN = ["--train_file", "{tiny}/data/train.parquet", "--test_file", "{tiny}/data/test.parquet"]
LOGIN = ["--hub_token", TOKEN]
STARTS = {
    "push": [*TRAIN, *LOGIN, "--push_to_hub", "--hub_model_id", "somebody/reviews"],
    "gone": [*TRAIN, *OWN, *LOGIN, "--push_to_hub", "--hub_model_id", "somebody/gone"],
    "no login": [*TRAIN, "--push_to_hub", "--hub_model_id", "somebody/reviews"],
    "no data": ["--model_name_or_path", "owner/tiny-roberta", "--dataset_name", "owner/nothing"],
    "no model": ["--dataset_name", "owner/tiny-imdb", "--model_name_or_path", "owner/nothing"],
}


@pytest.fixture(scope="module")
def hub(tiny):
    hub = Hub({"models/owner/tiny-roberta": tiny / "model", "datasets/owner/tiny-imdb": tiny / "data"})
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def runs(hub, tiny, tmp_path_factory):
    """What each of `STARTS`, all at the same time, has left behind: (status, stdout, stderr, folder)."""
    env = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    env |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path_factory.mktemp("hub_home"))}
    folders = {name: tmp_path_factory.mktemp("hub") for name in STARTS}
    todo = [([flag.format(tiny=tiny) for flag in flags], str(folders[name])) for name, flags in STARTS.items()]
    command = [sys.executable, PRELUDES / "fork_starts.py", json.dumps(todo)]
    statuses = json.loads(subprocess.run(command, env=env, capture_output=True, check=True, timeout=200).stdout)
    outputs = [[(folder / f"run.{stream}").read_text() for stream in ("out", "err")] for folder in folders.values()]
    return {
        name: (status, *output, folders[name]) for name, status, output in zip(STARTS, statuses, outputs, strict=True)
    }


def test_model_and_data_from_the_hub_and_result_to_it(runs, hub):
    status, _, err, _ = runs["push"]
    pushed = hub.pushed["somebody/reviews"]
    assert status == 0, err
    wanted = {"model.safetensors", "config.json", "tokenizer.json", "README.md", "arguments.json", "all_results.json"}
    assert wanted <= pushed.keys()
    assert not any(name.startswith("checkpoint-") for name in pushed)
    assert sum("somebody/reviews/commit/" in request for request in hub.asked) == 1, "pushed once, at the end"
    card = pushed["README.md"].decode()
    assert "owner/tiny-imdb" in card and "owner/tiny-roberta" in card and "- F1:" in card and "- Auc:" in card
    assert f"- Loss: {json.loads(pushed['eval_results.json'])['eval_loss']:.4f}" in card
    recipe = json.loads(pushed["arguments.json"])
    assert recipe["rdrop_alpha"] == 5.0 and recipe["label_smoothing_factor"] == 0.1


def test_token_is_in_no_file_and_no_message(runs, hub):
    status, out, err, folder = runs["push"]
    assert status == 0 and TOKEN not in out + err
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files |= hub.pushed["somebody/reviews"]
    names = " ".join(files)
    assert all(word in names for word in ("training_args.bin", "events.out.tfevents", "README.md", "arguments.json"))
    assert [name for name, content in files.items() if TOKEN.encode() in content] == []


@pytest.mark.parametrize("flags", [["--hub_tokn", TOKEN], [f"--hub_tokn={TOKEN}"], [TOKEN]])
def test_mistyped_flag_is_named_without_its_value(start, flags):
    run = start(base=flags).wait()
    run.assert_one_line(2, "unknown argument")
    assert TOKEN not in run.out + run.err and ("--hub_tokn" in run.said[0]) == (flags != [TOKEN])


def test_hub_that_is_gone_at_the_end_costs_no_result(runs):
    status, out, err, folder = runs["gone"]
    assert status not in (0, 2) and "accuracy " in out and "Traceback" in err, err
    results = folder / "results_rdrop"
    assert "eval_f1" in json.loads((results / "all_results.json").read_text())
    assert "eval_f1" in json.loads((results / "eval_results.json").read_text())
    assert (results / "model.safetensors").stat().st_size > 0 and (results / "tokenizer.json").is_file()
    assert "imdb" not in (results / "README.md").read_text(), "the card does not name a data set that was not used"


def test_no_login_is_found_out_before_training(runs):
    status, out, err, folder = runs["no login"]
    assert status == 2 and len(said(err)) == 1 and "Traceback" not in err and "401" in said(err)[0], err
    assert list((folder / "results_rdrop").iterdir()) == [], "the folder is free for the next try"


def test_push_while_offline_is_found_out_before_training(start, tmp_path):
    run = start("--push_to_hub", "--hub_model_id", "somebody/reviews").wait()
    run.assert_one_line(2, "offline")
    assert "'loss'" not in run.out and list((tmp_path / "results_rdrop").iterdir()) == []


@pytest.mark.parametrize("what", ["no data", "no model"])
def test_repository_that_is_not_on_the_hub(runs, what):
    status, _, err, _ = runs[what]
    assert status == 2 and len(said(err)) == 1 and "owner/nothing" in said(err)[0] and "Traceback" not in err, err
