"""What a resumed run may change, what it says about it, and what it does about files that are missing or damaged."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import tiny_imdb
from conftest import Run, assert_same_end
from safetensors.torch import load_file

from train_rdrop import find_best, find_checkpoint, parse_args

SHORT = ("--max_train_samples", "120", "--max_eval_samples", "40", "--num_train_epochs", "2")  # 8 steps an epoch
BY_STEPS = ("--eval_strategy", "steps", "--eval_steps", "3", "--save_strategy", "steps", "--save_steps", "3")
PATIENT = ("--early_stopping_patience", "0", "--load_best_model_at_end", "false")
LAST = ("--resume_from_checkpoint", "last")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, argv):
    """A finished run with checkpoint-8 and checkpoint-16, to be copied."""
    run = Run([*argv, *SHORT], tmp_path_factory.mktemp("finished")).wait()
    assert run.status == 0, run.err
    return run


@pytest.fixture
def checkpoints(finished, tmp_path):
    """A copy of the output folder of `finished`."""
    return Path(shutil.copytree(finished.folder / "results_rdrop", tmp_path / "results_rdrop"))


@pytest.fixture
def resume(start, checkpoints):
    """`resume(*flags)` goes on from a copy of `finished`."""
    return lambda *flags, **kwargs: start(*SHORT, *LAST, *flags, **kwargs)


WAYS = {  # flags, the step in which the run is killed, and its last checkpoint's
    "plain": ((), 13, 12),
    "length buckets": (("--length_buckets", "4"), 13, 12),
    "accumulation": (("--gradient_accumulation_steps", "2"), 5, 3),
}


@pytest.mark.parametrize("way", WAYS)
def test_run_that_was_killed_amid_an_epoch_ends_as_if_never_killed(start, way):
    more, step, last = WAYS[way]
    flags = (*SHORT, *BY_STEPS, *PATIENT, *more)
    whole = start(*flags, "--output_dir", "whole")
    killed = start(*flags, prelude=f"kill.py SIGKILL step {step}")
    assert (whole.wait().status, killed.wait().status) == (0, -9), whole.err
    resumed = start(*flags, *LAST).wait()
    assert resumed.status == 0 and f"steps {last} to " in resumed.out, resumed.err
    assert_same_end(whole, resumed, ("whole", "results_rdrop"))


def test_each_epoch_groups_by_length_in_an_order_of_its_own(start):
    flags = (*SHORT, "--train_sampling_strategy", "group_by_length", "--eval_strategy", "no", "--save_strategy", "no")
    run = start(*flags, prelude="show_batches.py").wait()
    assert run.status == 0, run.err
    assert "last: epoch 2, step 16, now in ./results_rdrop" in run.out and "which also chose" not in run.out
    first, second = map(json.loads, re.findall("^TRAIN (.*)", run.out, re.M))
    assert first != second and sorted(first) == sorted(second) and len(first) == 120


def warnings(run):
    return [line for line in run.err.splitlines() if "other flags" in line]


@pytest.mark.parametrize("load_best", ["true", "false"])
def test_best_of_another_metric_is_not_compared(resume, tmp_path, load_best):
    """Trainer would hold the accuracies of the epochs to come against the best F1, now or when resumed once more."""
    (tmp_path / "results_rdrop" / "arguments.json").write_text("damaged")
    flags = ("--metric_for_best_model", "accuracy", "--load_best_model_at_end", load_best)
    run = resume("--num_train_epochs", "3", *flags).wait()
    run.assert_one_line(2, "by another --metric_for_best_model")


def test_changed_flags_are_said_in_one_warning_with_both_values(resume):
    odd = f"\x1b[31m{'long' * 99}"
    run = resume("--seed", "7", "--learning_rate", "1e-4", "--max_train_samples", "100", "--run_name", odd).wait()
    assert run.status == 0, run.err
    (warning,) = warnings(run)
    for change in ("seed 42 -> 7", "learning_rate 0.001 -> 0.0001", "max_train_samples 120 -> 100"):
        assert change in warning
    assert warning.count(" -> ") == 4, "others have not changed"
    assert "\x1b" not in run.err.replace("\x1b[A", "") and len(warning) < 500, "escaped, and cut"
    assert "4242" not in warning
    assert run.json("arguments.json")["seed"] == 42, "what the run began with"


def test_same_flags_are_no_reason_to_warn(resume):
    run = resume().wait()
    assert run.status == 0 and warnings(run) == [], run.err


@pytest.mark.parametrize("content", [None, "", '{"seed": 42'])
def test_damaged_arguments_are_said_and_stop_no_resume(resume, tmp_path, content):
    path = tmp_path / "results_rdrop" / "arguments.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    run = resume().wait()
    assert run.status == 0, run.err
    (warning,) = warnings(run)
    assert "arguments.json is missing or damaged" in warning


def test_flags_that_do_not_decide_the_result_change_no_figure(resume, finished):
    free = ("--logging_steps", "1", "--save_total_limit", "5", "--dataloader_num_workers", "1", "--run_name", "other")
    halves = ("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--logging_dir", "other_logs")
    run = resume(*free, *halves, "--per_device_eval_batch_size", "7").wait()
    assert run.status == 0, run.err
    figures = [one.json("all_results.json")["eval_f1"] for one in (finished, run)]
    assert figures[0] == figures[1]


def test_more_epochs_go_on_with_a_word(resume, tmp_path):
    checkpoints = tmp_path / "results_rdrop"
    shutil.copytree(checkpoints / "checkpoint-8", checkpoints / "checkpoint-8-copy2")  # is not newer than 16
    run = resume("--num_train_epochs", "3").wait()
    assert run.status == 0 and "num_train_epochs 2.0 -> 3.0" in warnings(run)[0], run.err
    assert run.json("trainer_state.json")["global_step"] == 24 and "steps 16 to 24" in run.out
    assert run.json("arguments.json")["num_train_epochs"] == 2, "what the run began with"


@pytest.mark.parametrize("file, share", [("model.safetensors", 0.5), ("optimizer.pt", 0)])
def test_checkpoint_that_cannot_be_read_keeps_its_traceback_and_all_files(resume, tmp_path, file, share):
    path = tmp_path / "results_rdrop" / "checkpoint-16" / file
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results_rdrop").rglob("*")}
    run = resume("--num_train_epochs", "3").wait()
    run.assert_traceback("checkpoint-16")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "results_rdrop").rglob("*")}
    shutil.rmtree(path.parent)
    run = resume("--num_train_epochs", "3").wait()
    assert run.status == 0 and "steps 8 to 24" in run.out, run.err


def best_is_first(folder, best):
    """Make the checkpoints in `folder` say that the best one is `best`, the first, and that no later one beats it."""
    for name in ("checkpoint-8", "checkpoint-16"):
        path = folder / name / "trainer_state.json"
        state = json.loads(path.read_text())
        state |= {"best_global_step": 8, "best_model_checkpoint": str(best), "best_metric": 2.0}
        state["log_history"][0]["eval_f1"] = 2.0
        path.write_text(json.dumps(state))


@pytest.fixture
def moved(checkpoints):
    """A run that was moved, its best checkpoint the first, and another run, one that goes on, where it was."""
    best_is_first(checkpoints, "results_rdrop/checkpoint-8")
    moved = checkpoints.rename(checkpoints.with_name("moved"))
    other = Path(shutil.copytree(moved, checkpoints)) / "checkpoint-8"
    log, changes = re.subn(r'("eval_runtime": )', r"\g<1>9", (other / "trainer_state.json").read_text())
    assert changes
    (other / "trainer_state.json").write_text(log)
    shutil.copy(moved / "checkpoint-16" / "model.safetensors", other)
    return moved


@pytest.mark.parametrize("epochs", [2, 4])
def test_moved_run_ends_with_its_own_best_model(resume, moved, epochs):
    best = load_file(moved / "checkpoint-8" / "model.safetensors")
    run = resume("--output_dir", moved, "--num_train_epochs", epochs).wait()
    assert run.status == 0 and "best: epoch 1, checkpoint-8, now in" in run.out, run.err
    saved = load_file(moved / "model.safetensors")
    assert all(best[name].equal(saved[name]) for name in best)
    kept = {path.name for path in moved.glob("checkpoint-*")}
    assert kept == {"checkpoint-8", f"checkpoint-{8 * epochs}"}, "the best one survives newer ones"


def test_moved_run_whose_best_checkpoint_is_missing_is_refused_before_training(resume, moved):
    shutil.rmtree(moved / "checkpoint-8")
    run = resume("--output_dir", "moved").wait()
    run.assert_one_line(2, "the best model so far, checkpoint-8, is missing", "--load_best_model_at_end")
    assert run.out == "", "nothing was loaded"
    shutil.rmtree(moved.with_name("results_rdrop"))
    run = resume("--output_dir", "moved").wait()
    run.assert_one_line(2, "the best model so far, checkpoint-8, is missing")
    run = resume("--output_dir", "moved", "--load_best_model_at_end", "false", "--num_train_epochs", "3").wait()
    assert run.status == 0 and "steps 16 to 24" in run.out, run.err


def test_run_that_goes_on_in_another_folder_keeps_its_best_model(start, finished, tmp_path):
    old = shutil.copytree(finished.folder / "results_rdrop", tmp_path / "old")
    best_is_first(old, old / "checkpoint-8")
    flags = ("--num_train_epochs", "3", "--output_dir", "new", "--resume_from_checkpoint", "old/checkpoint-16")
    run = start(*SHORT, *flags, "--report_to", "none").wait()
    assert run.status == 0 and (tmp_path / "new" / "checkpoint-24").exists(), run.err
    best, saved = (load_file(tmp_path / folder / "model.safetensors") for folder in ("old/checkpoint-8", "new"))
    assert all(best[name].equal(saved[name]) for name in best)
    assert "best: epoch 1, checkpoint-8, now in new" in run.out and run.json("eval_results.json", "new")["epoch"] == 1


def test_run_that_goes_on_from_another_working_directory_keeps_its_best_model(resume, tmp_path):
    best_is_first(tmp_path / "results_rdrop", "results_rdrop/checkpoint-8")
    (tmp_path / "elsewhere").mkdir()
    flags = ("--num_train_epochs", "3", "--output_dir", "../results_rdrop")
    run = resume(*flags, folder=tmp_path / "elsewhere").wait()
    assert run.status == 0 and "best: epoch 1, checkpoint-8, now in ../results_rdrop" in run.out, run.err


def test_best_step_that_was_not_saved_is_no_best_model(start):
    """Trainer goes on with the checkpoint's steps, and would take the best of the checkpoints for the best model."""
    flags = (*SHORT, *BY_STEPS[:2], "--eval_steps", "1", *BY_STEPS[4:], "--metric_for_best_model", "loss", *PATIENT)
    run = start(*flags).wait()
    assert run.status == 0, run.err
    load_best = ("--load_best_model_at_end", "true")
    run = start(*flags, "--eval_steps", "3", *load_best, *LAST).wait()
    run.assert_one_line(2, "saves at other steps than it evaluates", "--load_best_model_at_end false")
    path = run.folder / "results_rdrop" / "checkpoint-16" / "trainer_state.json"
    state = json.loads(path.read_text())
    (seventh,) = [entry["eval_loss"] for entry in state["log_history"] if entry["step"] == 7]
    path.write_text(json.dumps(state | {"best_global_step": 7, "best_metric": seventh}))
    run = start(*SHORT, "--metric_for_best_model", "loss", *LAST).wait()
    run.assert_one_line(2, "the best model so far, checkpoint-7, is missing, or was never saved")


def found(folder, asked):
    return find_checkpoint(parse_args(["--output_dir", str(folder), "--resume_from_checkpoint", str(asked)]))


def test_checkpoint_is_found_by_its_steps_whatever_its_name(checkpoints):
    newest = (checkpoints / "checkpoint-16").rename(checkpoints / "keep")
    assert found(checkpoints, newest) == newest
    assert found(checkpoints, checkpoints / "checkpoint-8") == checkpoints / "checkpoint-8", "overwrites none"
    (checkpoints / "checkpoint-8").rename(checkpoints / "old")
    assert found(checkpoints, newest) == newest, "though no other is there"


def test_last_checkpoint_may_be_a_link(checkpoints):
    elsewhere = checkpoints.parent / "elsewhere"
    (checkpoints / "checkpoint-16").rename(elsewhere)
    (checkpoints / "checkpoint-16").symlink_to(elsewhere)
    assert found(checkpoints, "last") == checkpoints / "checkpoint-16"


@pytest.mark.parametrize("load_best", ["true", "false"])
def test_best_metric_of_no_step_is_no_best_model(checkpoints, load_best):
    """A loss that was never finite is beaten by none: Trainer then holds an infinite one, of no step."""
    path = checkpoints / "checkpoint-16" / "trainer_state.json"
    state = json.loads(path.read_text()) | {"best_global_step": None, "best_metric": math.inf}
    path.write_text(json.dumps(state))
    args = parse_args(["--metric_for_best_model", "loss", "--load_best_model_at_end", load_best])
    assert find_best(args, checkpoints / "checkpoint-16") is None


@pytest.mark.parametrize("what", ["kind", "size", "config"])
def test_checkpoint_of_another_model_is_refused(resume, tiny, tmp_path, what):
    config = tmp_path / "results_rdrop" / "checkpoint-16" / "config.json"
    flags = ()
    if what == "kind":  # of the same shapes
        shutil.copytree(tiny / "model", tmp_path / "model")
        bert = json.loads(config.read_text()) | {"model_type": "bert"}
        (tmp_path / "model" / "config.json").write_text(json.dumps(bert))
        flags = ("--model_name_or_path", "model")
    elif what == "size":
        flags = ("--config_overrides", "num_hidden_layers=1")
    else:
        config.write_text("{}")
    run = resume(*flags).wait()
    run.assert_one_line(2, "checkpoint-16", *["--model_name_or_path"] if what != "config" else ["cannot load"])


def test_figures_of_an_earlier_end_go_with_its_model(resume, tmp_path):
    stale = tmp_path / "results_rdrop" / "test_results.json"
    stale.write_text("{}")
    resume(prelude="fail.py bug predict").wait().assert_traceback("RuntimeError: a bug")
    left = {path.name for path in (tmp_path / "results_rdrop").iterdir()}
    assert "model.safetensors" in left and not left & {"test_results.json", "all_results.json", "predictions.csv"}


@pytest.mark.parametrize("labels", [("pos", "neg"), ("bad", "good"), ("neg", "pos", "so so")])
def test_data_of_other_classes_are_refused(resume, tmp_path, labels):
    tiny_imdb.write_data(tmp_path / "other", names=labels)
    run = resume("--dataset_name", "other").wait()
    run.assert_one_line(2, "checkpoint-16 has the classes {'neg': 0, 'pos': 1}, the data {", repr(labels[-1]))


def test_error_after_training_says_how_to_go_on(resume):
    resume(prelude="fail.py bug predict").wait().assert_traceback("RuntimeError: a bug", "results_rdrop/checkpoint-16")


def test_disk_that_is_full_on_resuming_costs_no_file(resume, tmp_path):
    before = (tmp_path / "results_rdrop" / "arguments.json").read_text()
    resume(prelude="full_disk.py json.dump").wait().assert_traceback(
        "No space left", "--resume_from_checkpoint results_rdrop/checkpoint-16"
    )
    assert (tmp_path / "results_rdrop" / "arguments.json").read_text() == before


def test_best_checkpoint_that_lost_its_model_is_an_error(start):
    run = start(*SHORT, prelude="lose_models.py 16").wait()
    assert run.status == 1, run.err
    assert re.search(r"the best checkpoint, \S*results_rdrop/checkpoint-\d+, holds no model", run.err)
