"""Several processes: two on the CPU, with gloo, stand in for two GPUs."""

import socket
import subprocess
import sys

import pytest
import tiny_imdb
from conftest import SCRIPT, scalars
from test_interruption import HASTE
from safetensors.torch import load_file

DDP = ("--ddp_backend", "gloo")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def start_two(start):
    """`start_two(*flags)` starts two processes of one run with the environment that torchrun gives them."""

    def start_two(*flags, **kwargs):
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        runs = [start(*flags, *DDP, env={**env, "RANK": rank, "LOCAL_RANK": rank}, **kwargs) for rank in "01"]
        return [run.wait() for run in runs]

    return start_two


def test_two_processes_train_the_model_of_one_with_twice_the_batch(start, start_two, tmp_path):
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


def test_sigterm_stops_two_processes_after_the_same_step(start_two, start, tmp_path):
    flags = ("--num_train_epochs", "60", "--early_stopping_patience", "0", "--enable_jit_checkpoint")
    stop = "import os, signal, threading; threading.Timer(DELAY, os.kill, (os.getpid(), signal.SIGTERM)).start()"
    at_first_log = (
        "from transformers import TrainerCallback, trainer; " + HASTE + "\n"
        "class Stop(TrainerCallback):\n"
        "    def on_log(self, args, state, control, **kwargs):\n"
        "        " + stop.replace("DELAY", "0.1 * args.process_index") + "\n"
        "trainer.DEFAULT_CALLBACKS.append(Stop)"
    )
    runs = start_two(*flags, "--max_steps", "400", "--logging_steps", "5", prelude=at_first_log)
    assert [run.status for run in runs] == [143, 143], runs[0].err + runs[1].err
    (complete,) = [path for path in (tmp_path / "results_rdrop").iterdir() if (path / "trainer_state.json").exists() and path.name in runs[0].said[0]]
    assert (complete / "rng_state_0.pth").exists() and (complete / "rng_state_1.pth").exists()


def test_no_buffers_are_broadcast_between_the_passes(start_two, tmp_path):
    prelude = (
        "import torch.nn.parallel.distributed as ddp; "
        "ddp.DistributedDataParallel._sync_buffers = lambda self: print('BUFFERS', self.forward_sync_buffers); "
        "init = ddp.DistributedDataParallel.__init__; "
        "ddp.DistributedDataParallel.__init__ = lambda self, *args, **kwargs: print('DDP', kwargs) or init(self, *args, **kwargs)"
    )
    runs = start_two("--max_steps", "2", "--eval_strategy", "no", "--load_best_model_at_end", "false", prelude=prelude)
    assert [run.status for run in runs] == [0, 0], runs[0].err
    assert all("DDP" in run.out and "BUFFERS" not in run.out for run in runs)
    assert all("find_unused_parameters': True" not in run.out for run in runs)


@pytest.fixture(scope="module", autouse=True)
def launched(tiny, tmp_path_factory):
    """Real launchers, in the background while the other tests run: {"torchrun" (bad data), "accelerate"}."""
    flags = f"--model_name_or_path {tiny / 'model'} --use_cpu --ddp_backend gloo --num_train_epochs 1 --dataset_name".split()
    bad = tmp_path_factory.mktemp("bad")
    for name in ("train.csv", "test.csv"):
        (bad / name).write_text("text,label\na film,0\n,1\n")
    one_machine = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    commands = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT, *flags, bad, "--output_dir", "bad"],
        "accelerate": ["accelerate.commands.launch", "--main_process_port", free_port(), *one_machine.split(), SCRIPT, *flags, tiny / "data", "--output_dir", "good"],
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path_factory.mktemp("launched")}
    started = {name: subprocess.Popen([sys.executable, "-m", *map(str, c)], **pipes) for name, c in commands.items()}
    yield started
    for run in started.values():
        run.kill()


def test_bad_data_ends_all_processes_with_one_line(launched):
    _, err = launched["torchrun"].communicate()
    assert launched["torchrun"].returncode != 0 and err.count("train_rdrop.py: split 'train': 1 of 2 rows") == 1, err
    assert "exitcode: 2" in err or "exitcode  : 2" in err, err


def test_accelerate_launch(launched):
    out, err = launched["accelerate"].communicate()
    assert launched["accelerate"].returncode == 0 and out.count("Test split:") == 1, err
