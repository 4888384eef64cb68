"""Runs that were killed, resumed or moved, or share a folder with another, end as if nothing had happened."""

import re
import shutil
import signal

import pytest
import tiny_imdb
from conftest import FEW, LAST, contents, predictions, read_json, same_weights, train, weights
from tiny_imdb import make_reviews

import train_rdrop
from train_rdrop import UserError, complete_checkpoints

STEPS = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2"]
FIGURES = ["eval_loss", "eval_accuracy", "eval_f1", "eval_auc", "epoch", "best_epoch"]


@pytest.fixture
def results(finished, tmp_path):
    """A copy of the output folder of a finished run, where `train(tmp_path, ...)` looks for it."""
    return shutil.copytree(finished, tmp_path / "results")


def steps_of(folder):
    """The steps of the complete checkpoints in `folder`."""
    return [int(path.name.split("-")[1]) for path in complete_checkpoints(str(folder), 1)]


def assert_same_end(one, two):
    """Both folders hold the same figures, predictions and models, bit for bit: the best, and the last."""
    ends = [{name: read_json(folder, "all_results.json")[name] for name in FIGURES} for folder in (one, two)]
    assert ends[0] == ends[1] and predictions(one) == predictions(two) and steps_of(one) == steps_of(two)
    last = f"checkpoint-{steps_of(one)[-1]}"
    assert same_weights(one, two) and same_weights(one / last, two / last)


# ---- killed and resumed
def test_killed_in_an_epoch_and_resumed(start, argv, tmp_path):
    train(tmp_path, *argv, *FEW, *STEPS)
    assert start(*FEW, *STEPS, dies=("step", 7)).wait().status == -signal.SIGKILL
    assert steps_of(tmp_path / "results_rdrop")[-1] == 6  # in the middle of the second epoch
    resumed = start(*FEW, *STEPS, *LAST).wait()
    assert resumed.status == 0, resumed.err
    assert_same_end(tmp_path / "results", tmp_path / "results_rdrop")


def test_killed_in_a_save_and_resumed(start, finished, tmp_path):
    assert start(*FEW, dies=("save", "checkpoint-8/scheduler.pt")).wait().status == -signal.SIGKILL
    assert (tmp_path / "results_rdrop" / "checkpoint-8" / "model.safetensors").exists()
    assert steps_of(tmp_path / "results_rdrop") == [4]
    resumed = start(*FEW, *LAST).wait()
    assert resumed.status == 0, resumed.err
    assert_same_end(finished, tmp_path / "results_rdrop")


def test_killed_before_the_first_checkpoint(start, argv, tmp_path):
    """There is nothing to resume from, and the folder stays that of the killed run."""
    assert start(*FEW, dies=("step", 2)).wait().status == -signal.SIGKILL
    for flags in ([], LAST):
        with pytest.raises(UserError):
            train(tmp_path, *argv, *FEW, *flags, "--output_dir", tmp_path / "results_rdrop")


def test_checkpoint_without_one_of_its_parts_is_passed_over(results):
    for part in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert steps_of(results) == [4, 8]
        shutil.move(results / "checkpoint-8" / part, results / "away")
        assert steps_of(results) == [4]
        shutil.move(results / "away", results / "checkpoint-8" / part)


def test_half_written_checkpoint_and_results_are_written_anew(results, finished, argv, tmp_path):
    state = results / "checkpoint-8" / "trainer_state.json"
    state.write_text(state.read_text()[:-5])
    for name in ("all_results.json", "eval_results.json", "trainer_state.json", "model.safetensors", "predictions.csv"):
        (results / name).write_text("")
    assert steps_of(results) == [4]
    train(tmp_path, *argv, *FEW, *LAST)
    assert_same_end(finished, results)


def test_missing_best_checkpoint_is_not_replaced_by_another(results, argv, tmp_path):
    """A copy without checkpoint-4, which its last checkpoint names as the best."""
    shutil.rmtree(results / "checkpoint-4")
    state = results / "checkpoint-8" / "trainer_state.json"
    state.write_text(re.sub(r'"best_global_step": \d+', '"best_global_step": 4', state.read_text()))
    with pytest.raises(UserError):
        train(tmp_path, *argv, *FEW, *LAST)
    # the last model does not need it
    train(tmp_path, *argv, *FEW, *LAST, "--load_best_model_at_end", "false", "--save_total_limit", "1")
    assert same_weights(results, results / "checkpoint-8")


# ---- finished runs
def test_early_stopped_run_is_not_trained_any_further(argv, tmp_path):
    flags = [*FEW, "--num_train_epochs", "9", "--early_stopping_patience", "1", "--early_stopping_threshold", "0.9"]
    train(tmp_path, *argv, *flags)
    shutil.copytree(tmp_path / "results", tmp_path / "before")
    assert read_json(tmp_path, "before", "trainer_state.json")["global_step"] == 8, "of 36"
    (tmp_path / "results" / "model.safetensors").unlink()
    train(tmp_path, *argv, *flags, *LAST)
    assert_same_end(tmp_path / "before", tmp_path / "results")
    assert read_json(tmp_path, "results", "trainer_state.json")["global_step"] == 8
    trained = [read_json(tmp_path, folder, "train_results.json") for folder in ("before", "results")]
    assert trained[0] == trained[1] and "train_loss" in trained[0]


def test_run_that_ended_within_an_epoch_is_not_trained_any_further(argv, tmp_path):
    flags = [*FEW, "--max_steps", "6", "--load_best_model_at_end", "false"]
    train(tmp_path, *argv, *flags)
    before = weights(tmp_path / "results")
    train(tmp_path, *argv, *flags, *LAST)
    after = weights(tmp_path / "results")
    assert all(before[name].equal(after[name]) for name in before) and steps_of(tmp_path / "results")[-1] == 6


def test_finished_run_goes_on_with_more_epochs(results, finished, argv, tmp_path):
    flags = [*argv, *FEW, *LAST, "--num_train_epochs", "3"]
    figures = train(tmp_path, *flags)
    assert figures["epoch"] == 3 and read_json(results, "trainer_state.json")["global_step"] == 12
    assert steps_of(results)[-1] == 12
    # killed after its last checkpoint: the figures on disk are those of two epochs
    shutil.copy(finished / "train_results.json", results)
    figures = train(tmp_path, *flags)
    assert figures["epoch"] == 3 and "train_loss" not in figures


def test_moved_run_keeps_its_own_best_model(results, finished, argv, tmp_path):
    """Its old place, which its last checkpoint names, holds another run with a best checkpoint of the same step."""
    best = read_json(finished, "trainer_state.json")["best_global_step"]
    old = tmp_path / "old" / f"checkpoint-{best}"
    other = {4: 8, 8: 4}[best]
    shutil.copytree(finished / f"checkpoint-{other}", old)
    state = results / "checkpoint-8" / "trainer_state.json"
    moved = state.read_text().replace(str(finished / old.name), str(old))
    assert str(old) in moved and not same_weights(old, results)
    state.write_text(moved)
    train(tmp_path, *argv, *FEW, *LAST)
    assert_same_end(finished, results)


# ---- what is not resumed
OTHER = ["--rdrop_alpha 1", "--seed 1", "--metric_for_best_model loss", "--learning_rate 1e-5"]


@pytest.mark.parametrize("flags", [*OTHER, "--max_train_samples 60"])
def test_run_is_not_resumed_with_other_settings(status_2, results, argv, flags):
    before = contents(results)
    lines = status_2([*argv, *FEW, *flags.split(), *LAST, "--output_dir", results])
    assert flags.split()[0][2:] in lines[-1] and contents(results) == before


def test_run_is_not_resumed_with_changed_data(status_2, argv, tmp_path):
    file = tmp_path / "train.csv"
    make_reviews(64, seed=3).to_csv(file)
    flags = [*argv, *FEW, "--train_file", file, "--test_file", file, "--max_steps", "1"]
    train(tmp_path, *flags)
    make_reviews(64, seed=3).select(range(1, 64)).to_csv(file)  # one negative review less
    before = contents(tmp_path / "results")
    assert "rows" in status_2([*flags, *LAST, "--output_dir", tmp_path / "results"])[-1]
    assert contents(tmp_path / "results") == before


# ---- two runs in one folder
@pytest.mark.parametrize("together", [False, True])
def test_second_run_in_a_folder_is_refused_and_changes_nothing(results, argv, tmp_path, monkeypatch, together):
    if together:  # both have found the folder empty
        monkeypatch.setattr(train_rdrop, "find_checkpoint", lambda args: None)
    before = contents(results)
    with pytest.raises(UserError):
        train(tmp_path, *argv, *FEW)
    assert contents(results) == before


def test_folder_with_any_file_of_a_run_is_refused(argv, tmp_path):
    for file in ("arguments.json", "checkpoint-9/optimizer.pt", "model-00001-of-2.safetensors"):
        folder = tmp_path / file.replace("/", "_")
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text("{}")
        with pytest.raises(UserError):
            train(tmp_path, *argv, *FEW, "--output_dir", folder)
        assert (folder / file).read_text() == "{}"


def test_run_that_fails_before_its_first_checkpoint_frees_the_folder(argv, tmp_path):
    diverging = ["--learning_rate", "1e32", "--max_grad_norm", "0", "--logging_steps", "1"]
    with pytest.raises(FloatingPointError):
        train(tmp_path, *argv, *FEW, *diverging)
    assert list((tmp_path / "results").iterdir()) == []


def test_run_that_fails_later_keeps_its_folder(argv, tmp_path, finished, monkeypatch):
    with monkeypatch.context() as patch:
        log = train_rdrop.RDropTrainer.log

        def fail(self, *args, **kwargs):
            if self.state.global_step == 6:
                raise OSError("the disk is full")
            log(self, *args, **kwargs)

        patch.setattr(train_rdrop.RDropTrainer, "log", fail)
        with pytest.raises(OSError):
            train(tmp_path, *argv, *FEW)
    assert steps_of(tmp_path / "results") == [4] and (tmp_path / "results" / "arguments.json").exists()
    train(tmp_path, *argv, *FEW, *LAST)
    assert_same_end(finished, tmp_path / "results")


# ---- two processes
def wait_for_both(runs):
    assert [run.wait().status for run in runs] == [0, 0], runs[0].err + runs[1].err


def test_two_processes_train_the_model_of_one_with_twice_the_batch(argv, start_two, tmp_path):
    tiny_imdb.write_model(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    # 37 rows do not fill the evaluation batches of two processes
    flags = ["--model_name_or_path", tmp_path / "model", *FEW, "--max_eval_samples", "37", "--max_grad_norm", "0.05"]
    two = start_two(*flags, "--per_device_train_batch_size", "8")
    train(tmp_path, *argv, *flags)
    wait_for_both(two)
    one, other = weights(tmp_path / "results"), weights(tmp_path / "results_rdrop")
    assert all(one[name].allclose(other[name], rtol=1e-3, atol=1e-5) for name in one)
    logs = [read_json(tmp_path, name, "trainer_state.json")["log_history"] for name in ("results", "results_rdrop")]
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & {"loss", "ce", "kl", "grad_norm", "eval_accuracy", "eval_f1", "eval_auc"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), (name, ours, theirs)
    ours, theirs = (read_json(tmp_path, name, "eval_results.json") for name in ("results", "results_rdrop"))
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5), "each row counts once"
    ours, theirs = (predictions(tmp_path / name) for name in ("results", "results_rdrop"))
    assert len(ours) == 37 and [row["row"] for row in ours] == [row["row"] for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        assert float(row["p_pos"]) == pytest.approx(float(other["p_pos"]), rel=1e-3)


def test_two_processes_that_were_killed_and_resumed(start_two, tmp_path):
    flags = [*FEW, *STEPS, "--per_device_train_batch_size", "8", "--save_total_limit", "9"]
    whole = start_two(*flags, "--output_dir", "whole")
    wait_for_both(whole)
    history = read_json(tmp_path, "whole", "trainer_state.json")["log_history"]
    for entry in (entry for entry in history if "loss" in entry):
        assert entry["loss"] == pytest.approx(entry["ce"] + 5.0 * entry["kl"], rel=1e-4) and entry["kl"] > 0
    assert [run.wait().status for run in start_two(*flags, dies=("step", 7))] == [-signal.SIGKILL] * 2
    killed = tmp_path / "results_rdrop"
    (killed / "checkpoint-6" / "rng_state_1.pth").unlink()
    assert steps_of(killed) == [2, 4], "without the random state of the second process it is incomplete"
    wait_for_both(start_two(*flags, *LAST))
    assert_same_end(tmp_path / "whole", killed)


def test_two_processes_refuse_with_one_line(start_two, results, tmp_path):
    runs = [run.wait() for run in start_two(*FEW, "--output_dir", results)]
    assert [run.status for run in runs] == [2, 2]
    lines = [line for run in runs for line in run.err.splitlines() if line.startswith("train_rdrop.py: error:")]
    assert len(lines) == 1 and results.name in lines[0] and "Traceback" not in runs[0].err + runs[1].err
