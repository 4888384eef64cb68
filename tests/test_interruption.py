"""Killed, stopped and interrupted runs, and what they leave behind."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

SHORT = ("--num_train_epochs", "3", "--max_train_samples", "200")  # 13 steps an epoch
SIX = ("--num_train_epochs", "6", "--early_stopping_patience", "0")
FIGURES = ("eval_loss", "eval_accuracy", "eval_f1", "eval_auc", "epoch")


def figures(run):
    return {name: run.json("all_results.json")[name] for name in FIGURES}


def wait_for(condition, timeout=60):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    """A run that nobody interrupted."""
    from conftest import Run

    folder = tmp_path_factory.mktemp("whole")
    base = ["--model_name_or_path", tiny / "model", "--dataset_name", tiny / "data", "--learning_rate", "1e-3", "--use_cpu"]
    run = Run([*base, *SHORT], folder).wait()
    assert run.status == 0, run.err
    return run


@pytest.mark.parametrize(
    "moment",
    [
        "results_rdrop/checkpoint-13/model.safetensors",
        "results_rdrop/checkpoint-26/model.safetensors",
        "results_rdrop/checkpoint-26/optimizer.pt",
        "results_rdrop/checkpoint-26/trainer_state.json",
        "results_rdrop/checkpoint-39/rng_state.pth",
        "results_rdrop/checkpoint-39/trainer_state.json",
        "results_rdrop/train_results.json",
    ],
)
def test_killed_at_any_moment_and_resumed_it_ends_as_if_never_killed(start, whole, tmp_path, moment):
    run = start(*SHORT)
    wait_for(lambda: (tmp_path / moment).exists() or run.process.exitcode is not None)
    run.process.kill()
    assert run.wait().status == -signal.SIGKILL
    resumed = start(*SHORT, "--resume_from_checkpoint", "last").wait()
    if "checkpoint-13/" in moment:  # the first checkpoint was never finished
        assert resumed.status == 2 and "nothing to resume from" in resumed.said[0]
        again = start(*SHORT).wait()
        assert again.status == 2 and "no complete checkpoint" in again.said[0] and "another --output_dir" in again.said[0]
        return
    assert resumed.status == 0, resumed.err
    assert_same_end(whole, resumed, ("results_rdrop", "results_rdrop"))


def test_half_written_checkpoint_is_passed_over_by_name(start, tmp_path):
    assert start("--num_train_epochs", "2").wait().status == 0
    for part in ("trainer_state.json", "optimizer.pt"):
        lost = tmp_path / "results_rdrop" / "checkpoint-50" / part
        kept = lost.rename(tmp_path / part)
        run = start("--num_train_epochs", "2", "--resume_from_checkpoint", "last", "--logging_steps", "1").wait()
        assert run.status == 0, run.err
        assert "checkpoint-50 is incomplete" in run.err and "checkpoint-25 is incomplete" not in run.err
        assert run.json("checkpoint-50/trainer_state.json")["global_step"] == 50  # written anew, from checkpoint-25
        assert "train_loss" not in run.json("train_results.json")
        kept.unlink()
    run = start("--resume_from_checkpoint", tmp_path / "results_rdrop" / "checkpoint-99").wait()
    assert run.status == 2 and "no complete checkpoint" in run.said[0]


def test_resume_from_a_path_goes_on_from_there(start, tmp_path):
    assert start("--num_train_epochs", "2", "--logging_steps", "1").wait().status == 0
    path = tmp_path / "results_rdrop" / "checkpoint-25"
    run = start("--num_train_epochs", "2", "--logging_steps", "1", "--resume_from_checkpoint", path).wait()
    assert run.status == 0, run.err
    assert "'epoch': '1.04'" in run.out and "'epoch': '1'}" not in run.out


def test_run_killed_after_it_stopped_early_does_not_train_on(start, tmp_path):
    flags = ("--early_stopping_patience", "1", "--early_stopping_threshold", "0.9", "--num_train_epochs", "9")
    whole = start(*flags).wait()
    assert whole.status == 0 and whole.json("trainer_state.json")["global_step"] == 50, whole.err
    wanted = figures(whole)
    for name in ("all_results.json", "model.safetensors"):
        (tmp_path / "results_rdrop" / name).unlink()
    resumed = start(*flags, "--resume_from_checkpoint", "last").wait()
    assert resumed.status == 0, resumed.err
    assert figures(resumed) == wanted and resumed.json("trainer_state.json")["global_step"] == 50


@pytest.mark.parametrize("flags", [(), ("--resume_from_checkpoint", "elsewhere/checkpoint-25")])
def test_folder_of_an_earlier_run_is_refused_untouched(start, tmp_path, flags):
    assert start("--num_train_epochs", "1").wait().status == 0
    shutil.copytree(tmp_path / "results_rdrop", tmp_path / "elsewhere")
    logs = list((tmp_path / "logs_rdrop").iterdir())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results_rdrop").rglob("*")}
    run = start("--num_train_epochs", "1", *flags).wait()
    assert run.status == 2 and len(run.said) == 1 and "Traceback" not in run.err
    assert "--resume_from_checkpoint last" in run.said[0] and "another --output_dir" in run.said[0]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "results_rdrop").rglob("*")}
    assert logs == list((tmp_path / "logs_rdrop").iterdir())


def test_finished_run_resumed_under_another_name_keeps_the_best_model(start, tmp_path):
    flags = ("--num_train_epochs", "2", "--metric_for_best_model", "loss", "--greater_is_better", "true")  # the first is best
    assert start(*flags).wait().status == 0
    best = (tmp_path / "results_rdrop" / "model.safetensors").read_bytes()
    assert best == (tmp_path / "results_rdrop" / "checkpoint-25" / "model.safetensors").read_bytes()
    (tmp_path / "results_rdrop").rename(tmp_path / "moved")
    resumed = start(*flags, "--output_dir", "moved", "--resume_from_checkpoint", "last").wait()
    assert resumed.status == 0 and (tmp_path / "moved" / "model.safetensors").read_bytes() == best, resumed.err


def test_results_cut_short_by_a_kill_are_written_anew(start, tmp_path):
    assert start("--num_train_epochs", "1").wait().status == 0
    for name in ("all_results.json", "eval_results.json", "trainer_state.json", "model.safetensors"):
        (tmp_path / "results_rdrop" / name).write_text("")
    resumed = start("--num_train_epochs", "1", "--resume_from_checkpoint", "last").wait()
    assert resumed.status == 0 and "eval_f1" in resumed.json("all_results.json"), resumed.err


def test_two_runs_at_once_in_one_folder(start, tmp_path):
    first = start(*SIX)
    wait_for(lambda: (tmp_path / "results_rdrop" / "_run.lock").exists())
    second = start(*SIX).wait()
    assert second.status == 2 and "another run is writing" in second.said[0], second.err
    first.process.kill()
    assert first.wait().status == -signal.SIGKILL
    shutil.rmtree(tmp_path / "results_rdrop")
    assert start("--num_train_epochs", "1").wait().status == 0


def test_nothing_to_resume_from(start):
    run = start("--resume_from_checkpoint", "last").wait()
    assert run.status == 2 and "nothing to resume from" in run.said[0] and len(run.said) == 1


LONG = ("--num_train_epochs", "200", "--logging_steps", "5", "--early_stopping_patience", "0")


# Trainer waits 3 s after a SIGTERM, to see whether a SIGKILL follows
HASTE = "from transformers.trainer_jit_checkpoint import CheckpointManager; CheckpointManager.__init__.__defaults__ = (0.2,)"


def assert_same_end(one, two, outputs):
    figures_of = [{name: run.json("all_results.json", out)[name] for name in FIGURES} for run, out in zip((one, two), outputs)]
    weights = [load_file(run.folder / out / "model.safetensors") for run, out in zip((one, two), outputs)]
    assert figures_of[0] == figures_of[1]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0] | weights[1])


def test_sigterm_saves_and_stops_and_resumed_it_ends_as_if_never_stopped(start, tmp_path):
    whole = start(*SIX, "--output_dir", "whole")
    run = start(*SIX, "--enable_jit_checkpoint", prelude=HASTE)
    wait_for(lambda: (tmp_path / "results_rdrop" / "checkpoint-25" / "trainer_state.json").exists())
    run.process.terminate()
    assert run.wait().status == 143, run.err
    assert len(run.said) == 1 and "--resume_from_checkpoint last" in run.said[0] and "Traceback" not in run.err
    names = {path.name for path in (tmp_path / "results_rdrop").iterdir()} - {"_run.lock"}
    assert all(name.startswith("checkpoint-") for name in names), "it went on to the final model or its figures"
    saved = Path(run.said[0].split()[-1].rstrip(".")).name
    step = run.json(f"{saved}/trainer_state.json")["global_step"]
    assert 25 < step < 150 and not (tmp_path / "results_rdrop" / saved / "checkpoint-is-incomplete.txt").exists()
    assert [e for e in run.json(f"{saved}/trainer_state.json")["log_history"] if "eval_f1" in e][-1]["step"] % 25 == 0
    resumed = start(*SIX, "--resume_from_checkpoint", "last").wait()
    assert whole.wait().status == resumed.status == 0, resumed.err
    assert_same_end(whole, resumed, ("whole", "results_rdrop"))


def test_ctrl_c_ends_in_one_line(start, tmp_path):
    run = start(*LONG)
    wait_for(lambda: "'loss'" in run.out if Path(f"{run.log}.out").exists() else False)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait().status == 130, run.err
    assert len(run.said) == 1 and run.said[0].startswith("train_rdrop.py: interrupted.") and "Traceback" not in run.err


@pytest.mark.parametrize("flags, what", [
    (("--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"), "logits of the evaluation are not finite after step 2"),
    (("--eval_strategy", "no", "--load_best_model_at_end", "false", "--save_steps", "1"), "loss of step 3 is not finite"),
    (("--eval_strategy", "no", "--load_best_model_at_end", "false", "--save_steps", "9", "--max_steps", "4"), "loss of step 3 is not finite"),
])
def test_loss_that_is_not_finite_stops_the_run(start, tmp_path, flags, what):
    # the warmup gives the first step learning rate 0, the second one that breaks the model
    run = start("--learning_rate", "1e32", "--save_strategy", "steps", "--save_total_limit", "9", "--max_grad_norm", "0", *flags).wait()
    assert run.status == 1, run.err
    assert len(run.said) == 1 and what in run.said[0] and "Traceback" not in run.err
    saved = {path.name for path in (tmp_path / "results_rdrop").iterdir()}
    assert not (saved - {"checkpoint-1", "checkpoint-2", "_run.lock"}), "nothing is saved after the loss was seen, nor a final model"
    assert "checkpoint-1" in saved or "9" in flags
