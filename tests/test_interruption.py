"""Killed, stopped and interrupted runs, and what they leave behind."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SCRIPT, Run, assert_same_end, newest_checkpoint, wait_for

from train_rdrop import RDropArguments

TINY = ("--max_train_samples", "64", "--max_eval_samples", "32")  # 4 steps an epoch
SHORT = (*TINY, "--num_train_epochs", "3")
ONE = (*TINY, "--num_train_epochs", "1")
TWO = (*TINY, "--num_train_epochs", "2")
LONG = (*TINY, "--num_train_epochs", "200", "--logging_steps", "5", "--early_stopping_patience", "0")
NO_EVAL = ("--eval_strategy", "no", "--load_best_model_at_end", "false")
LAST = ("--resume_from_checkpoint", "last")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, argv):
    """A run that nobody interrupted."""
    run = Run([*argv, *SHORT], tmp_path_factory.mktemp("whole")).wait()
    assert run.status == 0, run.err
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, argv):
    """A finished run with checkpoint-4 and checkpoint-8, the last, to be copied."""
    run = Run([*argv, *TWO], tmp_path_factory.mktemp("finished")).wait()
    assert run.status == 0, run.err
    return run


@pytest.fixture
def results(finished, tmp_path):
    """The output folder of a finished run."""
    return Path(shutil.copytree(finished.folder / "results_rdrop", tmp_path / "results_rdrop"))


@pytest.mark.parametrize(
    "moment",
    [
        "results_rdrop/checkpoint-8/optimizer.pt",
        "results_rdrop/checkpoint-8/trainer_state.json",
        "results_rdrop/checkpoint-12/rng_state.pth",
        "results_rdrop/train_results.json",
    ],
)
def test_killed_at_any_moment_and_resumed_it_ends_as_if_never_killed(start, whole, tmp_path, moment):
    run = start(*SHORT)
    wait_for(lambda: (tmp_path / moment).exists() or run.process.exitcode is not None)
    run.process.kill()
    assert run.wait().status == -signal.SIGKILL
    resumed = start(*SHORT, *LAST).wait()
    assert resumed.status == 0, resumed.err
    assert_same_end(whole, resumed)


def test_killed_before_its_first_checkpoint_it_blocks_its_folder_and_says_the_ways_out(start, tmp_path):
    assert start(*SHORT, prelude="kill.py SIGKILL step 3").wait().status == -signal.SIGKILL
    start(*SHORT, *LAST).wait().assert_one_line(2, "nothing to resume from")
    again = start(*SHORT).wait()
    again.assert_one_line(2, "holds an earlier run", "remove the folder", "another --output_dir")
    assert "--resume" not in again.said[0], "there is nothing to resume from"


def test_half_written_checkpoint_is_passed_over_with_a_warning(start, results, tmp_path):
    (results / "checkpoint-8" / "optimizer.pt").unlink()
    run = start(*TWO, *LAST).wait()
    assert run.status == 0, run.err
    assert "checkpoint-8 is incomplete" in run.err and "checkpoint-4 is incomplete" not in run.err
    assert "steps 4 to 8" in run.out and newest_checkpoint(results) == results / "checkpoint-8", "written anew"
    assert "train_loss" not in run.json("train_results.json")
    start(*LAST[:1], results / "checkpoint-99").wait().assert_one_line(2, "no complete checkpoint")


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_checkpoint_is_complete_with_all_its_parts(results, part):
    assert newest_checkpoint(results) == results / "checkpoint-8"
    (results / "checkpoint-8" / part).unlink()
    assert newest_checkpoint(results) == results / "checkpoint-4"


def test_checkpoint_is_complete_with_its_state_written_to_the_end(results):
    state = results / "checkpoint-8" / "trainer_state.json"
    state.write_text(state.read_text()[:-5])
    assert newest_checkpoint(results) == results / "checkpoint-4"


def test_checkpoint_is_complete_with_a_random_state_of_every_process(results):
    checkpoint = results / "checkpoint-8"
    assert newest_checkpoint(results, 2) == checkpoint, "of the one process that wrote it"
    arguments = (results / "arguments.json").read_text()
    (results / "arguments.json").write_text(arguments.replace('"world_size": 1', '"world_size": 2'))
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    assert newest_checkpoint(results, 2) == results / "checkpoint-4", "that of process 1 is missing"
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    assert newest_checkpoint(results, 2) == checkpoint


def test_resume_from_a_path_goes_on_from_there(start, results):
    flags = (*TWO, "--resume_from_checkpoint", results / "checkpoint-4")
    start(*flags).wait().assert_one_line(2, "results_rdrop/checkpoint-8 would be overwritten", "another --output_dir")
    run = start(*flags, "--output_dir", "other").wait()
    assert run.status == 0 and "steps 4 to 8" in run.out, run.err
    assert "'epoch': '2'}" in run.out and "'epoch': '1'}" not in run.out


def test_run_that_stopped_early_is_resumed_with_its_patience_used_up(start, tmp_path):
    flags = ("--early_stopping_patience", "2", "--early_stopping_threshold", "0.9", "--num_train_epochs", "9", *TINY)
    whole = start(*flags).wait()
    assert whole.status == 0 and whole.json("trainer_state.json")["global_step"] == 12, whole.err
    for name in ("all_results.json", "model.safetensors"):
        (tmp_path / "results_rdrop" / name).unlink()
    resumed = start(*flags, *LAST).wait()
    assert resumed.status == 0 and "eval_f1" in resumed.json("all_results.json"), resumed.err
    state = resumed.json("trainer_state.json")
    assert state["global_step"] <= 16, "one more epoch at the most"
    assert state["max_steps"] == 36 and state["num_train_epochs"] == 9


@pytest.mark.parametrize("flags", [(), ("--resume_from_checkpoint", "elsewhere/checkpoint-4")])
def test_folder_of_an_earlier_run_is_refused_untouched(start, results, tmp_path, flags):
    shutil.copytree(results, tmp_path / "elsewhere")
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*")}
    run = start(*ONE, *flags).wait()
    run.assert_one_line(2, "--resume_from_checkpoint last", "remove the folder", "another --output_dir")
    assert before == {path: path.stat().st_mtime_ns for path in results.rglob("*")}
    assert not (tmp_path / "logs_rdrop").exists()


@pytest.mark.parametrize("file", ["arguments.json", "checkpoint-9/optimizer.pt", "model-00001-of-2.safetensors"])
def test_folder_with_any_file_of_a_run_is_refused(start, tmp_path, file):
    (tmp_path / "results_rdrop" / file).parent.mkdir(parents=True)
    (tmp_path / "results_rdrop" / file).write_text("{}")
    run = start().wait()
    run.assert_one_line(2, "holds an earlier run", "remove the folder", "another --output_dir")
    assert "--resume" not in run.said[0], "no checkpoint is complete"
    assert (tmp_path / "results_rdrop" / file).read_text() == "{}"


def test_results_cut_short_by_a_kill_are_written_anew(start, results):
    for name in ("all_results.json", "eval_results.json", "trainer_state.json", "model.safetensors"):
        (results / name).write_text("")
    resumed = start(*TWO, *LAST).wait()
    assert resumed.status == 0 and "eval_f1" in resumed.json("all_results.json"), resumed.err


def test_second_run_in_the_folder_of_one_at_work_is_refused(start, tmp_path):
    first = start(*LONG)
    wait_for(lambda: (tmp_path / "results_rdrop" / "arguments.json").exists())
    start(*LONG).wait().assert_one_line(2, "holds an earlier run", "another --output_dir")
    assert first.process.exitcode is None


def test_of_two_runs_started_together_in_one_folder_one_is_refused(start):
    runs = [start(*ONE, prelude="meet.py") for _ in range(2)]
    good, refused = sorted((run.wait() for run in runs), key=lambda run: run.status)
    assert good.status == 0, good.err
    refused.assert_one_line(2, "results_rdrop", "another run")


def test_nothing_to_resume_from(start):
    start(*LAST).wait().assert_one_line(2, "nothing to resume from")


@pytest.mark.parametrize("moment", ["loading", "step 3", "evaluation 8", "evaluation final"])
def test_sigterm_is_the_systems_own(start, tmp_path, moment):
    run = start(*SHORT, prelude=f"kill.py SIGTERM {moment}").wait()
    assert run.status == -signal.SIGTERM and run.said == [] and "Traceback" not in run.err, run.err
    assert (tmp_path / "results_rdrop" / "arguments.json").exists() == (moment != "loading")


def test_sigterm_with_jit_checkpoint_saves_one_first(start, tmp_path):
    run = start(*LONG, "--enable_jit_checkpoint", "--save_strategy", "no", "--load_best_model_at_end", "false")
    wait_for(lambda: "'loss'" in run.out)
    os.kill(run.process.pid, signal.SIGTERM)
    run.wait()
    (checkpoint,) = (tmp_path / "results_rdrop").glob("checkpoint-*")
    assert newest_checkpoint(tmp_path / "results_rdrop") == checkpoint


MOMENTS = {  # at which Ctrl-C comes, and what the line must name
    "step 3": "No checkpoint is complete",
    "step 7": "checkpoint-4",
    "evaluation final": "checkpoint-12",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_in_training_ends_in_one_line_with_the_way_on(start, tmp_path, moment):
    run = start(*SHORT, prelude=f"kill.py SIGINT {moment}").wait()
    run.assert_one_line(130, "train_rdrop.py: interrupted.", MOMENTS[moment])
    assert f"\n{run.said[0]}\n" in run.err, "on a line of its own, not at the end of the progress bar"
    nothing = moment == "step 3"
    assert ("--resume_from_checkpoint results_rdrop" in run.said[0]) != nothing
    assert (tmp_path / "results_rdrop" / "arguments.json").exists() != nothing, "freed, if nothing is there to go on"


def test_ctrl_c_just_after_the_start_lines_is_not_lost(start, argv, tmp_path):
    """In a Python of its own, and with data from the cache: else what imports leave is gone by then."""
    assert start("--num_train_epochs", "1", "--output_dir", "earlier").wait().status == 0
    command, pipe = [sys.executable, SCRIPT, *argv, "--num_train_epochs", "2"], subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as run:
        while "effective batch" not in run.stdout.readline():
            assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)  # Trainer begins
        run.send_signal(signal.SIGINT)
        _, err = run.communicate()
    assert run.returncode == 130 and "\ntrain_rdrop.py: interrupted." in err, err


def test_ctrl_c_before_training_ends_in_one_line(start, tmp_path):
    run = start(*SHORT, prelude="kill.py SIGINT loading").wait()
    run.assert_one_line(130, "train_rdrop.py: interrupted.")
    assert list((tmp_path / "results_rdrop").iterdir()) == []


def at_work(group):
    """Whether a process of `group` is left; one that has ended, and nobody waits for, does not count."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            state, _, process_group, *_ = path.read_text().rpartition(")")[2].split()
            if int(process_group) == group and state != "Z":
                return True
    return False


def test_signals_to_the_process_group_end_data_loader_workers_too(start, tmp_path):
    runs = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / number.name
        folder.mkdir()
        runs[number] = start(*LONG, "--dataloader_num_workers", "2", folder=folder, prelude="own_group.py")
    for number, run in runs.items():
        wait_for(lambda run=run: "'loss'" in run.out)
        os.killpg(run.process.pid, number)
    for number, run in runs.items():
        if run.wait().status == 1:  # at times it misses a worker before it has the signal itself
            run.assert_traceback("DataLoader worker (pid", "--resume_from_checkpoint results_rdrop")
        elif number == signal.SIGINT:
            run.assert_one_line(130, "interrupted")
        else:
            assert run.status == -number and run.said == [], run.err
        wait_for(lambda group=run.process.pid: not at_work(group))


def test_killed_data_loader_worker_keeps_its_traceback(start):
    run = start(*SHORT, prelude="fail.py worker 7").wait()
    run.assert_traceback("DataLoader worker (pid 7) is killed", "--resume_from_checkpoint results_rdrop/checkpoint-4")


def test_data_loader_workers_give_the_same_weights(start, whole):
    run = start(*SHORT, "--dataloader_num_workers", "2").wait()
    assert run.status == 0 and "fork" not in run.err, run.err
    assert_same_end(whole, run)


STEPS = ("--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1")
BROKEN, LOSS = "the logits of the evaluation are not finite", "the loss is not finite"
DIVERGED = {
    "evaluated each step": (STEPS, BROKEN, ["checkpoint-1"]),
    "saved each step": ((*NO_EVAL, *STEPS[4:], "--logging_steps", "1"), LOSS, ["checkpoint-1", "checkpoint-2"]),
    "saved at the end": ((*NO_EVAL, *STEPS[4:7], "9", "--max_steps", "4"), LOSS, ["checkpoint-4"]),
    "logged": ((*NO_EVAL, "--logging_steps", "1"), LOSS, []),
    "seen at the end": ((*NO_EVAL, "--save_strategy", "no", "--num_train_epochs", "1"), LOSS, []),
}


@pytest.mark.parametrize("how", DIVERGED)
def test_loss_that_is_not_finite_stops_the_run(start, tmp_path, how):
    flags, words, saved = DIVERGED[how]
    # the warmup gives the first step learning rate 0, the second one that breaks the model
    flags = ("--learning_rate", "1e32", "--max_grad_norm", "0", "--save_total_limit", "9", *TINY, *flags)
    run = start(*flags).wait()
    run.assert_traceback("FloatingPointError", words, "Start anew with a lower --learning_rate")
    left = {path.name for path in (tmp_path / "results_rdrop").iterdir()} - {"arguments.json"}
    assert sorted(left) == saved, "no final model"


def test_out_of_gpu_memory_says_what_to_change_and_leaves_the_folder_free(start, tmp_path):
    run = start(*ONE, prelude="fail.py gpu_memory 1").wait()
    run.assert_traceback("OutOfMemoryError", "--per_device_train_batch_size", "--gradient_accumulation_steps")
    notes = run.err[run.err.index("CUDA out of memory.") :]
    assert {*re.findall(r"--(\w+)", notes)} <= RDropArguments.__dataclass_fields__.keys()
    assert "--activation_checkpointing" in notes and "No checkpoint is complete" in notes
    assert list((tmp_path / "results_rdrop").iterdir()) == []
    again = start(*ONE, "--per_device_train_batch_size", "8", "--activation_checkpointing").wait()
    assert again.status == 0, again.err


def test_error_after_a_run_without_checkpoints_names_its_model(start, tmp_path):
    run = start(*NO_EVAL, "--save_strategy", "no", *TINY, prelude="fail.py bug predict").wait()
    run.assert_traceback("RuntimeError: a bug", "The trained model is in ./results_rdrop")
    assert (tmp_path / "results_rdrop" / "arguments.json").exists()


def test_disk_that_is_full_keeps_its_traceback_and_names_the_last_complete_checkpoint(start):
    run = start(*TWO, prelude="full_disk.py torch.save").wait()
    run.assert_traceback("No space left on device", "--resume_from_checkpoint results_rdrop/checkpoint-4")


@pytest.mark.parametrize(
    "step, hint", [("1", "No checkpoint is complete"), ("5", "--resume_from_checkpoint results_rdrop/checkpoint-4")]
)
def test_bug_in_training_keeps_its_traceback_and_says_how_to_go_on(start, tmp_path, step, hint):
    run = start(*TWO, prelude=f"fail.py bug {step}").wait()
    run.assert_traceback("RuntimeError: a bug", hint)
    assert (tmp_path / "results_rdrop" / "arguments.json").exists() == (step == "5")
