"""Several processes: two on the CPU, with gloo, stand in for two GPUs."""

import socket
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPT, Run, scalars
from safetensors.torch import load_file

DDP = ("--ddp_backend", "gloo")


@pytest.fixture
def start_two(start):
    """`start_two(*flags)` starts two processes of one run with the environment that torchrun gives them."""

    def start_two(*flags, **kwargs):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        runs = [start(*flags, *DDP, env={**env, "RANK": rank, "LOCAL_RANK": rank}, **kwargs) for rank in "01"]
        return [run.wait() for run in runs]

    return start_two


def test_two_processes_train_the_model_of_one_with_twice_the_batch(start, start_two, tiny, tmp_path):
    import tiny_imdb

    tiny_imdb.write_model(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    flags = ("--model_name_or_path", "model", "--num_train_epochs", "2", "--logging_steps", "5", "--max_grad_norm", "0.05", "--max_eval_samples", "37")
    one = start(*flags, "--per_device_train_batch_size", "16", "--output_dir", "one", "--logging_dir", "logs_one").wait()
    assert one.status == 0, one.err
    two = start_two(*flags, "--per_device_train_batch_size", "8", "--output_dir", "two", "--logging_dir", "logs_two")
    assert [run.status for run in two] == [0, 0], two[0].err + two[1].err
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name in weights[0]:
        assert weights[0][name].allclose(weights[1][name], rtol=1e-3, atol=1e-5), name
    logs = [run.json("trainer_state.json", name)["log_history"] for run, name in ((one, "one"), (two[0], "two"))]
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() & {"loss", "ce", "kl", "grad_norm", "learning_rate", "eval_loss", "eval_f1", "eval_auc"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), (key, ours, theirs)


def test_two_processes_write_log_and_speak_once(start_two, tmp_path):
    runs = start_two("--num_train_epochs", "2", "--logging_steps", "5", "--max_eval_samples", "37")
    assert [run.status for run in runs] == [0, 0], runs[0].err + runs[1].err
    assert "Test split:" in runs[0].out and runs[1].out == ""
    assert "unused parameters" not in runs[0].err + runs[1].err
    assert "Tokenizing" in runs[0].err and "Tokenizing" not in runs[1].err
    (folder,) = (tmp_path / "logs_rdrop").iterdir()
    logged = scalars(folder)
    for (_, loss), (_, ce), (_, kl) in zip(logged["train/loss"], logged["train/ce"], logged["train/kl"], strict=True):
        assert loss == pytest.approx(ce + 5.0 * kl, rel=1e-4)
    resumed = start_two("--num_train_epochs", "3", "--resume_from_checkpoint", "last")
    assert [run.status for run in resumed] == [0, 0], resumed[0].err + resumed[1].err
