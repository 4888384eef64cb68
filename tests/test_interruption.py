"""Killed, stopped and interrupted runs, and what they leave behind."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SCRIPT, Run, assert_same_end, said, wait_for

from train_rdrop import RDropArguments

SHORT = ("--num_train_epochs", "3", "--max_train_samples", "80")  # 5 steps an epoch
TINY = ("--max_train_samples", "64", "--max_eval_samples", "32")  # 4 steps an epoch
SIX = ("--num_train_epochs", "6", "--early_stopping_patience", "0")
LONG = ("--num_train_epochs", "200", "--logging_steps", "5", "--early_stopping_patience", "0")
NO_EVAL = ("--eval_strategy", "no", "--load_best_model_at_end", "false")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, argv):
    """A run that nobody interrupted."""
    run = Run([*argv, *SHORT], tmp_path_factory.mktemp("whole")).wait()
    assert run.status == 0, run.err
    return run


@pytest.mark.parametrize(
    "moment",
    [
        "results_rdrop/checkpoint-5/model.safetensors",
        "results_rdrop/checkpoint-10/model.safetensors",
        "results_rdrop/checkpoint-10/optimizer.pt",
        "results_rdrop/checkpoint-10/trainer_state.json",
        "results_rdrop/checkpoint-15/rng_state.pth",
        "results_rdrop/checkpoint-15/trainer_state.json",
        "results_rdrop/train_results.json",
    ],
)
def test_killed_at_any_moment_and_resumed_it_ends_as_if_never_killed(start, whole, tmp_path, moment):
    run = start(*SHORT)
    wait_for(lambda: (tmp_path / moment).exists() or run.process.exitcode is not None)
    run.process.kill()
    assert run.wait().status == -signal.SIGKILL
    resumed = start(*SHORT, "--resume_from_checkpoint", "last").wait()
    if "cannot resume from" in resumed.err:  # its last file was there, but not yet written
        resumed.assert_one_line(2, "checkpoint-15", "remove it and resume from the one before")
        shutil.rmtree(tmp_path / "results_rdrop" / "checkpoint-15")
        resumed = start(*SHORT, "--resume_from_checkpoint", "last").wait()
    if "checkpoint-5/" in moment:  # the first checkpoint was never finished
        resumed.assert_one_line(2, "nothing to resume from")
        again = start(*SHORT).wait()
        again.assert_one_line(2, "holds an earlier run", "remove the folder", "another --output_dir")
        return
    assert resumed.status == 0, resumed.err
    assert_same_end(whole, resumed)


def test_half_written_checkpoint_is_passed_over_by_name(start, tmp_path):
    assert start(*TINY, "--num_train_epochs", "2").wait().status == 0
    for part in ("trainer_state.json", "optimizer.pt"):
        lost = tmp_path / "results_rdrop" / "checkpoint-8" / part
        kept = lost.rename(tmp_path / part)
        run = start(*TINY, "--num_train_epochs", "2", "--resume_from_checkpoint", "last", "--logging_steps", "1").wait()
        assert run.status == 0, run.err
        assert "checkpoint-8 is incomplete" in run.err and "checkpoint-4 is incomplete" not in run.err
        assert run.json("checkpoint-8/trainer_state.json")["global_step"] == 8  # written anew, from checkpoint-4
        assert "train_loss" not in run.json("train_results.json")
        kept.unlink()
    run = start("--resume_from_checkpoint", tmp_path / "results_rdrop" / "checkpoint-99").wait()
    run.assert_one_line(2, "no complete checkpoint")


def test_resume_from_a_path_goes_on_from_there(start, tmp_path):
    assert start(*TINY, "--num_train_epochs", "2", "--logging_steps", "1").wait().status == 0
    path = tmp_path / "results_rdrop" / "checkpoint-4"
    run = start(*TINY, "--num_train_epochs", "2", "--logging_steps", "1", "--resume_from_checkpoint", path).wait()
    assert run.status == 0, run.err
    assert "'epoch': '1.25'" in run.out and "'epoch': '1'}" not in run.out


def test_run_that_stopped_early_is_resumed_with_its_patience_used_up(start, tmp_path):
    flags = ("--early_stopping_patience", "2", "--early_stopping_threshold", "0.9", "--num_train_epochs", "9", *TINY)
    whole = start(*flags).wait()
    assert whole.status == 0 and whole.json("trainer_state.json")["global_step"] == 12, whole.err
    for name in ("all_results.json", "model.safetensors"):
        (tmp_path / "results_rdrop" / name).unlink()
    resumed = start(*flags, "--resume_from_checkpoint", "last").wait()
    assert resumed.status == 0 and "eval_f1" in resumed.json("all_results.json"), resumed.err
    state = resumed.json("trainer_state.json")
    assert state["global_step"] <= 16, "one more epoch at the most"
    assert state["max_steps"] == 36 and state["num_train_epochs"] == 9


@pytest.mark.parametrize("flags", [(), ("--resume_from_checkpoint", "elsewhere/checkpoint-4")])
def test_folder_of_an_earlier_run_is_refused_untouched(start, tmp_path, flags):
    assert start(*TINY, "--num_train_epochs", "1").wait().status == 0
    shutil.copytree(tmp_path / "results_rdrop", tmp_path / "elsewhere")
    logs = list((tmp_path / "logs_rdrop").iterdir())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results_rdrop").rglob("*")}
    run = start(*TINY, "--num_train_epochs", "1", *flags).wait()
    run.assert_one_line(2, "--resume_from_checkpoint last", "remove the folder", "another --output_dir")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "results_rdrop").rglob("*")}
    assert logs == list((tmp_path / "logs_rdrop").iterdir())


@pytest.mark.parametrize("file", ["arguments.json", "checkpoint-9/optimizer.pt", "model-00001-of-2.safetensors"])
def test_folder_with_any_file_of_a_run_is_refused(start, tmp_path, file):
    (tmp_path / "results_rdrop" / file).parent.mkdir(parents=True)
    (tmp_path / "results_rdrop" / file).write_text("{}")
    run = start().wait()
    run.assert_one_line(2, "holds an earlier run", "remove the folder", "another --output_dir")
    assert (tmp_path / "results_rdrop" / file).read_text() == "{}"


def test_finished_run_resumed_under_another_name_keeps_the_best_model(start, tmp_path):
    first_is_best = ("--metric_for_best_model", "loss", "--greater_is_better", "true")
    flags = ("--num_train_epochs", "2", *TINY, *first_is_best)
    assert start(*flags).wait().status == 0
    best = (tmp_path / "results_rdrop" / "model.safetensors").read_bytes()
    assert best == (tmp_path / "results_rdrop" / "checkpoint-4" / "model.safetensors").read_bytes()
    (tmp_path / "results_rdrop").rename(tmp_path / "moved")
    resumed = start(*flags, "--output_dir", "moved", "--resume_from_checkpoint", "last").wait()
    assert resumed.status == 0 and (tmp_path / "moved" / "model.safetensors").read_bytes() == best, resumed.err


def test_results_cut_short_by_a_kill_are_written_anew(start, tmp_path):
    assert start(*TINY, "--num_train_epochs", "1").wait().status == 0
    for name in ("all_results.json", "eval_results.json", "trainer_state.json", "model.safetensors"):
        (tmp_path / "results_rdrop" / name).write_text("")
    resumed = start(*TINY, "--num_train_epochs", "1", "--resume_from_checkpoint", "last").wait()
    assert resumed.status == 0 and "eval_f1" in resumed.json("all_results.json"), resumed.err


def test_second_run_in_the_folder_of_one_at_work_is_refused(start, tmp_path):
    first = start(*SIX)
    wait_for(lambda: (tmp_path / "results_rdrop" / "arguments.json").exists())
    start(*SIX).wait().assert_one_line(2, "holds an earlier run", "another --output_dir")
    first.process.kill()
    assert first.wait().status == -signal.SIGKILL
    shutil.rmtree(tmp_path / "results_rdrop")
    assert start(*TINY, "--num_train_epochs", "1").wait().status == 0


def test_of_two_runs_started_together_in_one_folder_one_is_refused(start, tmp_path):
    runs = [start(*TINY, "--num_train_epochs", "1", prelude="meet.py") for _ in range(2)]
    good, refused = sorted((run.wait() for run in runs), key=lambda run: run.status)
    assert good.status == 0, good.err
    refused.assert_one_line(2, "results_rdrop")


def test_nothing_to_resume_from(start):
    start("--resume_from_checkpoint", "last").wait().assert_one_line(2, "nothing to resume from")


MOMENTS = {  # at which the run is killed, and the checkpoint that the line must name
    "loading": "No checkpoint",
    "step 3": "No checkpoint",
    "evaluation 10": "checkpoint-5",
    "evaluation final": "checkpoint-15",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_ends_the_run_at_once_with_one_line(start, tmp_path, moment):
    run = start(*SHORT, prelude=f"kill.py SIGTERM {moment}").wait()
    run.assert_one_line(143, "stopped by SIGTERM", MOMENTS[moment])
    if MOMENTS[moment] == "No checkpoint":
        assert not (tmp_path / "results_rdrop" / "arguments.json").exists(), "the folder is free again"
    else:
        assert "--resume_from_checkpoint last" in run.said[0]


def test_sigterm_with_jit_checkpoint_is_no_worse_and_resumed_it_ends_as_if_never_stopped(start, whole, tmp_path):
    run = start(*SHORT, "--enable_jit_checkpoint", prelude="kill.py SIGTERM step 7").wait()
    run.assert_one_line(143, "stopped by SIGTERM", "--resume_from_checkpoint last", "checkpoint-5")
    assert {path.name for path in (tmp_path / "results_rdrop").iterdir()} == {"arguments.json", "checkpoint-5"}
    resumed = start(*SHORT, "--resume_from_checkpoint", "last").wait()
    assert resumed.status == 0, resumed.err
    assert_same_end(whole, resumed)


def test_ctrl_c_ends_in_one_line(start):
    run = start(*LONG)
    wait_for(lambda: "'loss'" in run.out)
    os.kill(run.process.pid, signal.SIGINT)
    run.wait().assert_one_line(130, "train_rdrop.py: interrupted.")


def at_work(group):
    """Whether a process of `group` is left; one that has ended, and nobody waits for, does not count."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            state, _, process_group, *_ = path.read_text().rpartition(")")[2].split()
            if int(process_group) == group and state != "Z":
                return True
    return False


def test_killed_data_loader_worker_ends_the_run_in_one_line(start):
    run = start(*SHORT, prelude="fail.py worker 7").wait()
    run.assert_one_line(1, "DataLoader worker (pid 7) is killed", "--resume_from_checkpoint last", "checkpoint-5")


def test_signals_to_the_process_group_end_data_loader_workers_too(argv, tmp_path):
    killed = (1, "DataLoader worker (pid")  # at times the main process misses one before it has the signal
    ends = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "stopped by SIGTERM")}
    runs, command = {}, [sys.executable, SCRIPT, *argv, *LONG, "--dataloader_num_workers", "2"]
    for number in ends:
        folder = tmp_path / number.name
        folder.mkdir()
        with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
            runs[number] = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err, start_new_session=True)
    try:
        for number, run in runs.items():
            wait_for(lambda out=tmp_path / number.name / "out": "'loss'" in out.read_text(), 120)
            os.killpg(run.pid, number)
        for number, run in runs.items():
            run.wait(60)
            err = (tmp_path / number.name / "err").read_text()
            (line,) = said(err)
            assert any(run.returncode == status and words in line for status, words in (ends[number], killed)), err
            assert "No checkpoint has been saved" in line or "--resume_from_checkpoint last" in line
            wait_for(lambda group=run.pid: not at_work(group))
    finally:
        for run in runs.values():
            run.kill()


def test_data_loader_workers_give_the_same_weights(start, whole):
    run = start(*SHORT, "--dataloader_num_workers", "2").wait()
    assert run.status == 0 and "fork" not in run.err, run.err
    assert_same_end(whole, run)


STEPS = ("--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1")
BROKEN = "the logits of the evaluation are not finite"
DIVERGED = {
    "evaluated each step": (STEPS, BROKEN, ["checkpoint-1"]),
    "saved each step": ((*NO_EVAL, *STEPS[4:]), "the loss is not finite", ["checkpoint-1", "checkpoint-2"]),
    "saved at the end": ((*NO_EVAL, *STEPS[4:7], "9", "--max_steps", "4"), "the loss is not finite", []),
    "logged": ((*NO_EVAL, "--logging_steps", "1"), "the loss is not finite", []),
    "seen at the end": ((*NO_EVAL, "--save_strategy", "no", "--num_train_epochs", "1"), BROKEN, ["train_results.json"]),
}


@pytest.mark.parametrize("how", DIVERGED)
def test_loss_that_is_not_finite_stops_the_run(start, tmp_path, how):
    flags, words, saved = DIVERGED[how]
    # the warmup gives the first step learning rate 0, the second one that breaks the model
    flags = ("--learning_rate", "1e32", "--max_grad_norm", "0", "--save_total_limit", "9", *TINY, *flags)
    run = start(*flags).wait()
    run.assert_one_line(1, words, "the training has diverged", "Start anew with a lower --learning_rate")
    assert "--resume" not in run.said[0], "a resumed run keeps the learning rate"
    left = {path.name for path in (tmp_path / "results_rdrop").iterdir()} - {"arguments.json"}
    assert sorted(left) == saved, "nothing is saved after the loss was seen, nor a final model"


def test_out_of_gpu_memory_ends_in_one_line_and_leaves_the_folder_free(start, tmp_path):
    run = start(*TINY, "--num_train_epochs", "1", prelude="fail.py gpu_memory 1").wait()
    run.assert_one_line(1, "out of GPU memory", "--per_device_train_batch_size", "--gradient_accumulation_steps")
    flags = re.findall(r"--(\w+)", run.said[0])
    assert set(flags) <= RDropArguments.__dataclass_fields__.keys() and any("checkpointing" in flag for flag in flags)
    assert list((tmp_path / "results_rdrop").iterdir()) == []
    again = start(*TINY, "--num_train_epochs", "1", "--activation_checkpointing").wait()
    assert again.status == 0, again.err


@pytest.mark.parametrize("error", ["RuntimeError", "OSError"])
def test_disk_that_is_full_ends_in_one_line(start, error):
    run = start(*TINY, "--num_train_epochs", "2", *TINY, prelude=f"full_disk.py torch.save {error}").wait()
    run.assert_one_line(1, "the disk is full", "--resume_from_checkpoint last", "checkpoint-4")


def test_error_in_training_that_is_none_of_the_users_keeps_its_traceback(start):
    run = start(*TINY, prelude="fail.py bug 1").wait()
    assert run.status == 1 and "Traceback" in run.err and "RuntimeError: a bug" in run.err and not run.said
