"""The comparison of arms on the tiny data: interrupted, continued, printed again; its intervals against SciPy's."""

import subprocess
import sys

import arms
import numpy as np
import pytest
from conftest import ROOT, Run
from scipy import stats


@pytest.fixture
def compare(argv, tmp_path, monkeypatch):
    """`compare(*flags)` is `python arms.py *flags` on the tiny data; `.starts` lists its trainings."""
    starts = []

    def call(command, log, device=None):
        script, *rest = map(str, command)
        if script == str(arms.SCRIPT):
            starts.append(rest)
            if len(starts) > compare.interrupted_after:
                raise KeyboardInterrupt
        run = Run(rest, tmp_path, script=script, name=f"run{len(list(tmp_path.iterdir()))}").wait()
        assert run.status == 0, run.err
        open(log, "w").close()
        return run.out, 1.0

    def compare(*flags):
        arms.main([*flags, "--csv", str(tmp_path / "arms.csv"), *map(str, argv), "--max_train_samples", "32"])

    monkeypatch.setattr(arms, "call", call)
    compare.starts = starts
    return compare


ARMS = ("--arms", "smooth", "both", "--seeds", "1", "2", "--validation_fraction", "0.1", "--num_train_epochs", "1")


def test_interrupted_comparison_goes_on_where_it_stopped(compare, tmp_path, capsys, argv):
    compare.interrupted_after = 2
    with pytest.raises(KeyboardInterrupt):
        compare(*ARMS)
    kept = (tmp_path / "arms.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in kept[1:]] == [["smooth", "1"], ["both", "1"]]
    compare.starts.clear()
    compare.interrupted_after = 2
    compare(*ARMS)
    lines = (tmp_path / "arms.csv").read_text().splitlines()
    assert lines[:3] == kept and [line.split(",")[:2] for line in lines[3:]] == [["smooth", "2"], ["both", "2"]]
    for flags, alpha in zip(compare.starts, "05", strict=True):
        assert flags[flags.index("--rdrop_alpha") + 1] == alpha

    tables = capsys.readouterr().out.partition("| arm")[2]
    compare(*ARMS)
    assert len(compare.starts) == 2 and capsys.readouterr().out.partition("| arm")[2] == tables

    found = arms.read(tmp_path / "arms.csv", [*ARMS[6:], *map(str, argv), "--max_train_samples", "32"])
    loss = {arm: [found[arm, seed]["eval_loss"] for seed in (1, 2)] for arm in ("smooth", "both")}
    low, high = stats.ttest_rel(loss["both"], loss["smooth"]).confidence_interval(0.95)
    assert f"| {(low + high) / 2:+.3f} ± {(high - low) / 2:.3f} (" in tables
    assert f"| {np.mean(loss['both']):.3f} ± {np.std(loss['both'], ddof=1):.3f} |" in tables
    accuracy = 100 * np.array([found["both", seed]["accuracy"] for seed in (1, 2)])
    assert f"| both | 2 | {accuracy.mean():.2f} ± {accuracy.std(ddof=1):.2f} |" in tables
    gap = [found["both", seed]["test_nll"] - found["both", seed]["train_nll"] for seed in (1, 2)]
    assert f"| {np.mean(gap):.3f} ± " in tables
    assert "KL by epoch, both: " in tables and "KL by epoch, smooth" not in tables


def test_interval_and_power_are_those_of_scipy():
    differences = np.random.default_rng(0).normal(0.004, 0.01, 8)
    mean, width = arms.paired(differences)
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (mean - width, mean + width) == pytest.approx((low, high))
    n = arms.seeds_needed(differences, 0.005)
    draws = np.random.default_rng(1).normal(0.005, differences.std(ddof=1), (4000, n))
    power = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
    assert 0.77 < power < 0.85, "some 80 % of the experiments of that size see it"


def test_same_reviews_and_head_for_each_arm_and_twice_the_epochs_for_one():
    assert arms.arm_flags("smooth_twice", 4.0)[-1] == "8.0" and arms.arm_flags("both", 4.0)[-1] == "4.0"
    assert arms.arm_flags("two_pass", 4.0)[1] == "1e-9" and arms.arm_flags("alpha=0.5", 4.0)[1] == "0.5"


def test_unknown_arm_is_named():
    command = [sys.executable, ROOT / "tests" / "experiments" / "arms.py", "--arms", "booth"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "no arm is called booth" in run.stderr
