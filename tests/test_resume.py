"""What a resumed run may change and must not, and what it does about files that are damaged."""

import json
import re
import shutil

import pytest
from conftest import Run, assert_same_end
from safetensors.torch import load_file

from train_rdrop import UserError, find_checkpoint, parse_args

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
def resume(start, finished, tmp_path):
    """`resume(*flags)` goes on from a copy of `finished`."""
    shutil.copytree(finished.folder / "results_rdrop", tmp_path / "results_rdrop")
    return lambda *flags, **kwargs: start(*SHORT, *LAST, *flags, **kwargs)


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def test_run_that_was_killed_amid_an_epoch_ends_as_if_never_killed(start, strategy):
    flags = (*SHORT, *BY_STEPS, *PATIENT, "--train_sampling_strategy", strategy)
    whole = start(*flags, "--output_dir", "whole")
    killed = start(*flags, prelude="kill.py SIGKILL step 13")
    assert (whole.wait().status, killed.wait().status) == (0, -9), whole.err
    resumed = start(*flags, *LAST).wait()
    assert resumed.status == 0 and "steps 12 to 16" in resumed.out, resumed.err
    assert_same_end(whole, resumed, ("whole", "results_rdrop"))


def test_each_epoch_groups_by_length_in_an_order_of_its_own(start):
    flags = (*SHORT, "--train_sampling_strategy", "group_by_length", "--eval_strategy", "no", "--save_strategy", "no")
    run = start(*flags, "--load_best_model_at_end", "false", prelude="show_batches.py").wait()
    assert run.status == 0, run.err
    first, second = map(json.loads, re.findall("^TRAIN (.*)", run.out, re.M))
    assert first != second and sorted(first) == sorted(second) and len(first) == 120


CHANGED = {  # flags of a resumed run that decide its result, with what the line must say
    "--seed 7": "seed was 42, is 7",
    "--rdrop_alpha 1": "rdrop_alpha was 5.0, is 1.0",
    "--label_smoothing_factor 0": "label_smoothing_factor was 0.1, is 0.0",
    "--max_length 20": "max_length was None, is 20",
    "--max_train_samples 100": "max_train_samples was 120, is 100",
    "--max_eval_samples 30": "max_eval_samples was 40, is 30",
    "--validation_fraction 0.2": "validation_fraction was 0.0, is 0.2",
    "--text_pair_column label2": "text_pair_column was None, is label2",
    "--learning_rate 1e-4": "learning_rate was 0.001, is 0.0001",
    "--optim sgd": "optim was ",
    "--bf16": "bf16 was False, is True",
    "--max_steps 5": "max_steps was -1, is 5",
    "--num_train_epochs 1": "num_train_epochs was 2.0, is 1.0",
    "--per_device_train_batch_size 8": "effective_batch was 16, is 8",
    "--gradient_accumulation_steps 2": "effective_batch was 16, is 32",
    "--train_sampling_strategy group_by_length": "train_sampling_strategy was random, is group_by_length",
    "--model_name_or_path elsewhere": "is elsewhere",
    "--dataset_name elsewhere": "is elsewhere",
    "--train_file train.csv": "train_file was None, is train.csv",
    "--positive_label neg": "positive_label was None, is neg",
    "--seed 7 --rdrop_alpha 1 --warmup_steps 9": "seed was 42, is 7; rdrop_alpha was 5.0, is 1.0",
}


def test_changed_flags_that_decide_the_result_are_refused_by_name(finished, argv):
    output_dir = finished.folder / "results_rdrop"
    common = [str(word) for word in (*argv, *SHORT, *LAST, "--output_dir", output_dir)]
    assert find_checkpoint(parse_args(common)) == output_dir / "checkpoint-16"
    for flags, words in CHANGED.items():
        with pytest.raises(UserError) as error:
            find_checkpoint(parse_args([*common, *flags.split()]))
        assert words in str(error.value) and "needs the flags that it began with" in str(error.value)
        assert str(error.value).count(" was ") == flags.count("--"), error.value


def test_refused_resume_is_one_line_and_changes_nothing(resume, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results_rdrop").rglob("*")}
    run = resume("--seed", "7", "--learning_rate", "1e-4").wait()
    run.assert_one_line(2, "seed was 42, is 7", "learning_rate was 0.001, is 0.0001")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "results_rdrop").rglob("*")}


def test_flags_that_do_not_decide_the_result_may_change(resume, finished):
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
    assert run.status == 0 and "More epochs than the run began with" in run.err, run.err
    assert run.json("trainer_state.json")["global_step"] == 24 and "steps 16 to 24" in run.out
    assert run.json("arguments.json")["num_train_epochs"] == 2, "what the run began with"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("share", [0, 0.5])
def test_checkpoint_that_cannot_be_read_is_named(resume, tmp_path, file, share):
    path = tmp_path / "results_rdrop" / "checkpoint-16" / file
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    run = resume("--num_train_epochs", "3").wait()
    run.assert_one_line(2, "cannot resume from results_rdrop/checkpoint-16", "remove it and resume from the one before")
    if share == 0:
        shutil.rmtree(path.parent)
        run = resume("--num_train_epochs", "3").wait()
        assert run.status == 0 and "steps 8 to 24" in run.out, run.err


def test_moved_run_that_goes_on_in_another_folder_finds_its_best_checkpoint(start, finished, tmp_path):
    shutil.copytree(finished.folder / "results_rdrop", tmp_path / "moved")
    state = finished.json("checkpoint-16/trainer_state.json")
    state |= {"best_global_step": 8, "best_model_checkpoint": "results_rdrop/checkpoint-8", "best_metric": 2.0}
    (tmp_path / "moved" / "checkpoint-16" / "trainer_state.json").write_text(json.dumps(state))
    flags = ("--num_train_epochs", "3", "--output_dir", "new", "--resume_from_checkpoint", "moved/checkpoint-16")
    run = start(*SHORT, *flags, "--report_to", "none").wait()
    assert run.status == 0 and (tmp_path / "new" / "checkpoint-24").exists(), run.err
    best, saved = (load_file(tmp_path / folder / "model.safetensors") for folder in ("moved/checkpoint-8", "new"))
    assert all(best[name].equal(saved[name]) for name in best)
    assert "Curves" not in run.out and "Try it" in run.out


def test_error_after_training_is_not_blamed_on_the_checkpoint(resume):
    run = resume(prelude="fail.py bug predict").wait()
    assert run.status == 1 and "Traceback" in run.err and run.said == [], run.err


def test_disk_that_is_full_on_resuming_costs_no_file(resume, tmp_path):
    before = (tmp_path / "results_rdrop" / "arguments.json").read_text()
    run = resume(prelude="full_disk.py json.dump OSError").wait()
    run.assert_one_line(1, "the disk is full", "--resume_from_checkpoint last")
    assert (tmp_path / "results_rdrop" / "arguments.json").read_text() == before


def test_best_checkpoint_without_a_model_ends_in_one_line(start):
    run = start(*SHORT, prelude="lose_models.py 16").wait()
    assert run.status == 1 and len(run.said) == 1 and "Traceback" not in run.err, run.err
    assert re.search(r"the best checkpoint, results_rdrop/checkpoint-\d+, holds no model", run.said[0])
    assert "all machines must share --output_dir" in run.said[0]
