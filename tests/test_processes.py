"""Several processes: two on the CPU, with gloo, stand in for two GPUs, or for two machines with one each."""

import signal
import socket
import subprocess
import sys

import pytest
import tiny_imdb
import torch
from conftest import SCRIPT, assert_same_end, newest_checkpoint, predictions, scalars
from safetensors.torch import load_file

DDP = ("--ddp_backend", "gloo")
TINY = ("--max_train_samples", "64", "--max_eval_samples", "32", "--num_train_epochs", "2")  # 2 steps an epoch


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def start_two(start, tmp_path):
    """`start_two(*flags)` starts both processes of one run with the environment that torchrun gives them.

    With `folders`, each is on a machine of its own, and starts in its folder.
    """

    def start_two(*flags, folders=None, **kwargs):
        size = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1" if folders else "2"}
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **size}
        runs = []
        for rank, folder in zip("01", folders or (tmp_path, tmp_path), strict=True):
            place = {"RANK": rank, "LOCAL_RANK": "0" if folders else rank}
            runs.append(start(*flags, *DDP, env={**env, **place}, folder=folder, **kwargs))
        return runs

    return start_two


def wait_for_both(runs):
    runs = [run.wait() for run in runs]
    assert [run.status for run in runs] == [0, 0], runs[0].err + runs[1].err
    return runs


def test_two_processes_train_the_model_of_one_with_twice_the_batch(start, start_two, tmp_path):
    tiny_imdb.write_model(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    flags = ("--model_name_or_path", "model", "--num_train_epochs", "2", "--logging_steps", "2")
    flags += ("--max_train_samples", "64", "--max_grad_norm", "0.05", "--max_eval_samples", "32")
    flags += ("--learning_rate", "1e-2", "--per_device_train_batch_size")
    one, two = start(*flags, "16", "--output_dir", "one"), start_two(*flags, "8", "--output_dir", "two")
    assert one.wait().status == 0 and "no dropout" in one.err, one.err
    wait_for_both(two)
    assert "no dropout" in two[0].err and "no dropout" not in two[1].err
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name in weights[0]:
        assert weights[0][name].allclose(weights[1][name], rtol=1e-3, atol=1e-5), name
    logs = [run.json("trainer_state.json", name)["log_history"] for run, name in ((one, "one"), (two[0], "two"))]
    compared = {"loss", "ce", "kl", "grad_norm", "learning_rate", "eval_loss", "eval_f1", "eval_auc"}
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() & compared:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), (key, ours, theirs)


def test_evaluation_of_two_processes_is_that_of_one(start, start_two):
    # 37 examples do not fill the batches of two processes: what fills them up must not count
    flags = ("--learning_rate", "0", "--max_train_samples", "32", "--num_train_epochs", "1", "--max_eval_samples", "37")
    one, two = start(*flags, "--output_dir", "one"), start_two(*flags, "--output_dir", "two")
    assert one.wait().status == 0, one.err
    wait_for_both(two)
    figures = [run.json("all_results.json", name) for run, name in ((one, "one"), (two[0], "two"))]
    for name in ("eval_accuracy", "eval_f1", "eval_auc"):
        assert figures[0][name] == figures[1][name], name
    ours, theirs = (predictions(one.folder / name) for name in ("one", "two"))
    assert [row["row"] for row in ours] == [row["row"] for row in theirs] and len(ours) == 37
    assert all(
        float(row["p_pos"]) == pytest.approx(float(other["p_pos"])) for row, other in zip(ours, theirs, strict=True)
    )


def test_two_processes_write_log_and_speak_once(start, start_two, tmp_path):
    rare = ("--max_train_samples", "100", "--max_eval_samples", "36")  # not in the cache of tokens
    runs = wait_for_both(start_two("--num_train_epochs", "2", "--logging_steps", "2", *rare))
    assert runs[1].out == ""
    for line in (
        "train: 100 of 400 rows, {",
        "test: 36 of 100 rows, {",
        "device cpu",
        "effective batch 32, steps 0 to 8",
        "best: epoch ",
        ": accuracy ",
    ):
        assert sum(line in said for said in runs[0].out.splitlines()) == 1, (line, runs[0].out)
    assert "unused parameters" not in runs[0].err + runs[1].err
    assert "Tokenizing" in runs[0].err and "Tokenizing" not in runs[1].err
    (folder,) = (tmp_path / "logs_rdrop").iterdir()
    logged = scalars(folder)
    for (_, loss), (_, ce), (_, kl) in zip(logged["train/loss"], logged["train/ce"], logged["train/kl"], strict=True):
        assert loss == pytest.approx(ce + 5.0 * kl, rel=1e-4)

    one = start("--num_train_epochs", "3", *rare, "--resume_from_checkpoint", "last").wait()
    assert one.status == 0 and "steps 8 to " in one.out, one.err
    assert "world_size 2 -> 1" in one.err, "another number of processes is said"


def test_two_processes_that_were_killed_amid_an_epoch_end_as_if_never_killed(start_two, tmp_path):
    steps = ("--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1")
    flags = (*TINY, *steps, "--save_total_limit", "9", "--length_buckets", "4", "--max_train_samples", "96")
    whole = wait_for_both(start_two(*flags, "--output_dir", "whole"))  # 3 steps an epoch
    killed = start_two(*flags, prelude="kill.py SIGKILL step 5 1")
    assert killed[1].wait().status == -signal.SIGKILL and killed[0].wait().status != 0, killed[0].err
    results = tmp_path / "results_rdrop"
    assert newest_checkpoint(results, 2) == results / "checkpoint-5"
    (results / "checkpoint-5" / "rng_state_1.pth").unlink()
    resumed = wait_for_both(start_two(*flags, "--resume_from_checkpoint", "last"))
    assert "checkpoint-5 is incomplete" in resumed[0].err and "steps 4 to 6" in resumed[0].out
    assert "incomplete" not in resumed[1].err
    assert_same_end(whole[0], resumed[0], ("whole", "results_rdrop"))


def test_all_processes_wait_for_the_first_to_save(start_two, tmp_path):
    first, second = start_two(*TINY, "--max_steps", "1", prelude="slow_save.py")
    assert second.wait().status == 0, second.err
    assert (tmp_path / "saved").exists(), "a launcher would have killed the first"
    assert first.wait().status == 0, first.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="each process has a GPU")
def test_processes_without_a_gpu_are_not_runs_of_their_own(start_two, argv, tmp_path):
    runs = start_two(*TINY, base=[flag for flag in argv if flag != "--use_cpu"])
    assert [run.wait().status for run in runs] == [2, 2]
    runs[0].assert_one_line(2, "find no GPU", "--use_cpu")
    assert not (tmp_path / "results_rdrop").exists()


def test_machines_that_do_not_share_the_output_folder_end_in_one_line(start_two, tmp_path):
    folders = [tmp_path / "machine0", tmp_path / "machine1"]
    for folder in folders:
        folder.mkdir()
    first, second = (run.wait() for run in start_two(*TINY, folders=folders))
    second.assert_one_line(2, "all machines must share --output_dir ./results_rdrop")
    assert first.status != 0, "as long as no launcher ends it"
    assert not list(tmp_path.glob("*/results_rdrop/checkpoint-*"))


def test_processes_that_are_refused_leave_the_folder_to_the_run_at_work(start_two, tmp_path):
    (tmp_path / "results_rdrop").mkdir()
    (tmp_path / "results_rdrop" / "arguments.json").write_text("{}")
    first, second = (run.wait() for run in start_two(*TINY))
    first.assert_one_line(2, "holds an earlier run")
    assert second.status == 2 and second.said == [], second.err
    assert (tmp_path / "results_rdrop" / "arguments.json").read_text() == "{}"


def test_process_that_is_out_of_gpu_memory_says_so(start_two):
    _, second = start_two(*TINY, prelude="fail.py gpu_memory 1 1")
    second.wait().assert_traceback("OutOfMemoryError", "Halve --per_device_train_batch_size")


def test_no_buffers_are_broadcast_between_the_passes(start_two):
    without_evaluation = ("--eval_strategy", "no", "--load_best_model_at_end", "false")
    runs = wait_for_both(start_two("--max_steps", "2", *TINY, *without_evaluation, prelude="show_ddp.py"))
    assert all("DDP" in run.out and "BUFFERS" not in run.out for run in runs)
    assert all("find_unused_parameters': True" not in run.out for run in runs)


def launch(launcher, flags, folder):
    """The script, started by a launcher as users start it, on two processes: the ended process."""
    command = [sys.executable, "-m", *launcher, SCRIPT, *flags, "--use_cpu", *DDP, "--max_steps", "2"]
    return subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True)


def test_torchrun_ends_all_processes_with_one_line_on_bad_data(tiny, tmp_path):
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("text,label\na film,0\nanother film,0\n")
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run = launch(torchrun, ("--model_name_or_path", tiny / "model", "--dataset_name", tmp_path), tmp_path)
    assert run.returncode != 0 and run.stderr.count("train_rdrop.py: ") == 1, run.stderr
    assert "train has one label only, ['0']: nothing to learn" in run.stderr
    assert "exitcode: 2" in run.stderr or "exitcode  : 2" in run.stderr, run.stderr


def test_accelerate_launch(tiny, tmp_path):
    accelerate = ("accelerate.commands.launch", "--main_process_port", free_port(), "--multi_gpu")
    accelerate += ("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    flags = ("--model_name_or_path", tiny / "model", "--dataset_name", tiny / "data", "--output_dir", "good")
    run = launch(accelerate, flags, tmp_path)
    assert run.returncode == 0 and run.stdout.count("now in good") == 1, run.stderr
