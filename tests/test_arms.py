"""The comparison of arms on the tiny data: interrupted, continued, printed again; its intervals against SciPy's."""

import shutil
import subprocess
import sys

import arms
import noisy
import numpy as np
import pandas as pd
import pytest
import tiny_imdb
from conftest import ROOT, Run
from datasets import DatasetDict
from scipy import special, stats
from sklearn.metrics import log_loss
from transformers import RobertaModel

import train_rdrop


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

    ((setting, found),) = arms.read(tmp_path / "arms.csv").items()
    assert setting == arms.name_of([*ARMS[6:], *map(str, argv), "--max_train_samples", "32"])
    loss = {arm: [found[arm, seed]["eval_loss"] for seed in (1, 2)] for arm in ("smooth", "both")}
    low, high = stats.ttest_rel(loss["both"], loss["smooth"]).confidence_interval(0.95)
    assert f"| {(low + high) / 2:+.3f} ± {(high - low) / 2:.3f} (" in tables
    assert f"| {np.mean(loss['both']):.3f} ± {np.std(loss['both'], ddof=1):.3f} |" in tables
    accuracy = 100 * np.array([found["both", seed]["accuracy"] for seed in (1, 2)])
    assert f"| both | 2 | {accuracy.mean():.2f} ± {accuracy.std(ddof=1):.2f} |" in tables
    gap = [found["both", seed]["test_nll"] - found["both", seed]["train_nll"] for seed in (1, 2)]
    assert f"| {np.mean(gap):.3f} ± " in tables
    assert "KL by epoch, both: " in tables and "KL by epoch, smooth" not in tables


def show(*flags):
    """`python arms.py --show *flags`, which needs no torch, and not the script either."""
    script = str(ROOT / "tests" / "experiments" / "arms.py")
    code = "import runpy, sys; sys.argv = ['arms.py', '--show', *sys.argv[1:]]"
    code += f"; runpy.run_path({script!r}, None, '__main__')"
    code += "; assert not {'torch', 'transformers', 'datasets', 'train_rdrop'} & sys.modules.keys()"
    command = [sys.executable, "-c", code, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True)


def test_show_prints_each_setting_apart_and_starts_nothing(tmp_path):
    line = "{arm},{seed},{flags},0.8,{f1},0.9,0.5,0.1,0.45,4,{kl},600,{cpu},EPYC\n"
    table = [",".join(arms.COLUMNS) + "\n"]
    for seed, f1 in enumerate((0.81, 0.82, 0.84), 1):
        table.append(line.format(arm="smooth", seed=seed, flags="--model_name_or_path model", f1=f1, kl="", cpu=500))
        table.append(line.format(arm="both", seed=seed, flags="--model_name_or_path model", f1=0.83, kl="1 3", cpu=800))
        other = {"flags": "--model_name_or_path model@0123abcd", "f1": 0.7, "kl": "", "cpu": 500}
        table.append(line.format(arm="smooth", seed=seed, **other))
    for seed in (1, 2):
        alpha = {"arm": "alpha=2", "flags": "--model_name_or_path model", "f1": 0.85, "kl": "2 2", "cpu": 900}
        table.append(line.format(seed=seed, **alpha))
    (tmp_path / "mine.csv").write_text("".join(table))

    run = show("--csv", tmp_path / "mine.csv")
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.split("Setting: ")[1:]
    assert first.startswith("--model_name_or_path model\n") and second.startswith(
        "--model_name_or_path model@0123abcd\n"
    )
    named, alphas = first.split("by the seeds [1, 2] alone")
    low, high = stats.ttest_rel([0.83] * 3, [0.81, 0.82, 0.84]).confidence_interval(0.95)
    assert f"| {50 * (low + high):+.2f} ± {50 * (high - low):.2f} (2) |" in named and "| 1.60 ± 0.00 |" in named
    assert "| smooth | 3 | 80.00 ± 0.00 | 82.33 ± 1.53 |" in named and "alpha=2" not in named
    assert "| smooth | 2 | 80.00 ± 0.00 | 81.50 ± 0.71 |" in alphas and "| alpha=2 - smooth | 2 | " in alphas
    assert alphas.index("| smooth |") < alphas.index("| alpha=2 |") < alphas.index("| both |"), "in the order of alpha"
    assert "KL by epoch, both: 1.0000, 3.0000 (the highest of a seed: 3.0000; never falling: 3 of 3 seeds)" in named
    assert "| smooth | 3 | 80.00 ± 0.00 | 70.00 ± 0.00 |" in second and "both" not in second.partition("Shares")[0]

    run = show("--csv", tmp_path / "mine.csv", "--max_length", "64")
    assert run.returncode == 2 and "--show takes no other flag" in run.stderr


def test_show_pairs_a_setting_with_the_one_that_it_adds_flags_to(tmp_path):
    line = "{arm},{seed},{flags},0.8,{f1},{auc},0.5,0.1,{nll},4,{kl},600,500,EPYC\n"
    table, rng = [",".join(arms.COLUMNS) + "\n"], np.random.default_rng(0)
    base = "--model_name_or_path model"
    longer = f"{base} --config_overrides dropout=0.3"
    drawn = {}
    for flags in (base, longer, f"{base}2"):
        for seed in range(1, 6):
            for arm in ("both", "two_pass"):
                values = dict(zip(("f1", "auc", "nll"), rng.uniform(0.4, 0.9, 3).round(6), strict=True))
                drawn[flags, arm, seed] = values["auc"]
                kl = "1 2 3" if flags == base or seed == 1 else "1 3 2"
                table.append(line.format(arm=arm, seed=seed, flags=flags, kl=kl, **values))
    (tmp_path / "mine.csv").write_text("".join(table))
    run = show("--csv", tmp_path / "mine.csv")
    assert run.returncode == 0, run.stderr
    first, more, other = run.stdout.split("Setting: ")[1:]
    assert "Changed by" not in first + other, "only the second has all flags of the first, and more"
    _, _, changes = more.partition("Changed by --config_overrides dropout=0.3")

    def auc(flags, arm):
        return 100 * np.array([drawn[flags, arm, seed] for seed in range(1, 6)])

    plain, high = ({arm: auc(flags, arm) for arm in ("both", "two_pass")} for flags in (base, longer))
    gains = [runs["both"] - runs["two_pass"] for runs in (high, plain)]
    for name, pair in {"both": (high["both"], plain["both"]), "both - two_pass": gains}.items():
        low, top = stats.ttest_rel(*pair).confidence_interval(0.95)
        (row,) = [line for line in changes.splitlines() if line.startswith(f"| {name} | 5 |")]
        better = int(np.sum(pair[0] > pair[1]))
        assert row.split(" | ")[4] == f"{(low + top) / 2:+.2f} ± {(top - low) / 2:.2f} ({better})"
    assert "never falling: 5 of 5 seeds" in first and "never falling: 1 of 5 seeds" in more


def test_show_prints_what_the_pages_state():
    """Of each row of a table on results, in README or on its own page, every cell stands in one row that is printed."""
    printed = show().stdout.splitlines()
    names = [*arms.ARMS, *(f"{one} - {two}" for one, two in arms.PAIRS)]
    pages = ROOT / "README.md", ROOT / "tests" / "experiments" / "README.md"
    for page, tables in zip(pages, (("both - ce", "both - smooth"), names), strict=True):
        rows = [line for line in page.read_text().splitlines() if line.split("|")[1:2] and " |" in line]
        rows = [row.replace(", wrong labels |", " |") for row in rows]
        rows = [row for row in rows if row.split("|")[1].strip() in names or row.startswith("| alpha=")]
        assert {row.split("|")[1].strip() for row in rows} >= set(tables)
        for row in rows:
            name, *cells = row.strip("| ").split(" | ")
            same = [line for line in printed if line.startswith(f"| {name} |")]
            assert any(all(f"| {value} " in line for value in cells) for line in same), row


def test_other_model_or_data_in_a_folder_of_the_same_name_is_another_setting(compare, tiny, tmp_path, argv, capsys):
    shutil.copytree(tiny, tmp_path / "copy")
    one = arms.name_of(["--model_name_or_path", str(tiny / "model"), "--train_file", str(tiny / "data/test.parquet")])
    same = [
        f"--model_name_or_path={tmp_path / 'copy' / 'model'}/",
        "--train_file",
        f"{tmp_path}/copy/data/test.parquet",
    ]
    assert (
        arms.name_of(same) == one and one.startswith("--model_name_or_path model@") and " test.parquet@" not in one[:36]
    )
    (tmp_path / "copy" / "model" / ".cache").write_text("of a download")
    assert arms.name_of(same) == one
    tiny_imdb.make_reviews(100, seed=3).to_parquet(tmp_path / "copy" / "data" / "test.parquet")
    assert arms.name_of(same).split()[:2] == one.split()[:2] and arms.name_of(same) != one
    assert arms.name_of(["--model_name_or_path", "owner/model"]) == "--model_name_or_path owner/model"

    # a hidden change of the weights alone: nothing that was run is taken for it
    compare.interrupted_after = 9
    flags = ("--arms", "smooth", "--seeds", "1", "--num_train_epochs", "1")
    compare(*flags)
    tiny_imdb.write_model(tmp_path / "other" / "model", initializer_range=0.1)
    argv[1] = tmp_path / "other" / "model"
    compare(*flags)
    assert len(compare.starts) == 2 and len(arms.read(tmp_path / "arms.csv")) == 2
    compare(*flags)
    assert len(compare.starts) == 2


def test_lines_without_a_hash_are_shown_but_not_pooled(compare, tmp_path):
    compare.interrupted_after = 9
    flags = ("--arms", "smooth", "--seeds", "1", "--num_train_epochs", "1")
    compare(*flags)
    file = tmp_path / "arms.csv"
    file.write_text(file.read_text().replace(next(iter(arms.read(file))), "--model_name_or_path model"))
    compare(*flags)
    assert len(compare.starts) == 2
    assert show("--csv", file).stdout.count("| smooth | 1 |") == 2, "one in each setting"


def test_interval_and_power_are_those_of_scipy():
    differences = np.random.default_rng(0).normal(0.004, 0.01, 8)
    for confidence in (0.95, 0.999):
        mean, width = arms.paired(differences, confidence)
        low, high = stats.ttest_1samp(differences, 0).confidence_interval(confidence)
        assert (mean - width, mean + width) == pytest.approx((low, high))
    n = arms.seeds_needed(differences.std(ddof=1), 0.005)
    draws = np.random.default_rng(1).normal(0.005, differences.std(ddof=1), (4000, n))
    power = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
    assert 0.77 < power < 0.85, "some 80 % of the experiments of that size see it"
    assert arms.needed(differences).startswith(f"{n} (")


def test_calibration_is_that_of_scikit_learn_and_of_a_count_by_hand():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (3000, 3))
    labels = np.array([rng.choice(3, p=p) for p in special.softmax(logits, axis=-1)])
    assert arms.nll(logits, labels) == pytest.approx(log_loss(labels, special.softmax(logits, axis=-1)))
    assert arms.fitted_temperature(logits, labels) == pytest.approx(1, abs=0.06), "labels were drawn from them"
    assert arms.fitted_temperature(4 * logits, labels) == pytest.approx(4, abs=0.24)
    p = special.softmax(4 * logits, axis=-1)
    assert arms.calibration_error(special.softmax(logits, axis=-1), labels) < 0.03 < arms.calibration_error(p, labels)

    # two bins by hand: confidences 0.6, 0.7 | 0.8, 0.9; right: no, yes | yes, no
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    labels = np.array([1, 1, 1, 1])
    by_hand = 0.5 * abs(1 / 2 - 0.65) + 0.5 * abs(1 / 2 - 0.85)
    assert arms.calibration_error(p, labels, bins=2) == pytest.approx(by_hand)


def test_noisy_files_of_each_seed_and_their_calibration(compare, tmp_path, capsys):
    imdb = DatasetDict({"train": tiny_imdb.make_reviews(80, seed=5), "test": tiny_imdb.make_reviews(60, seed=6)})
    folder = tmp_path / "noisy"
    folder.mkdir()
    truth = {(split, row["text"]): ("neg", "pos")[row["label"]] for split, rows in imdb.items() for row in rows}
    for seed in (1, 2):
        noisy.write(folder, imdb, seed, train=40, noisy=8, validation=30, test=50)
    drawn = {}
    for split, seed in [(split, seed) for split in ("train", "validation", "test") for seed in (1, 2)]:
        rows = drawn[split, seed] = pd.read_csv(folder / f"{split}_{seed}.csv")
        source = "test" if split == "test" else "train"
        wrong = sum(truth[source, row.text] != row.label for row in rows.itertuples())
        assert (len(rows), wrong) == {"train": (40, 8), "validation": (30, 0), "test": (50, 0)}[split]
    assert not set(drawn["train", 1]["text"]) & set(drawn["validation", 1]["text"])
    assert not drawn["train", 1].equals(drawn["train", 2]) and not drawn["test", 1].equals(drawn["test", 2])

    compare.interrupted_after = 9
    files = [f"--{split}_file={folder}/{split}_{{seed}}.csv" for split in ("train", "validation", "test")]
    last = ("--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false")
    compare("--arms", "both", "--seeds", "1", "2", "--num_train_epochs", "2", *files, *last)
    for seed, flags in zip("12", compare.starts, strict=True):
        assert f"--train_file={folder}/train_{seed}.csv" in flags
    ((setting, found),) = arms.read(tmp_path / "arms.csv").items()
    assert f"--train_file train_{{seed}}.csv@{arms.contents(folder)} " in setting
    for run in found.values():
        assert run["best_epoch"] == 2 and 0 <= run["ece"] <= 1 and 0 < run["brier"] < 1
        assert run["scaled_nll"] != run["test_nll"] and float(run["temperature"]) > 0
    tables = capsys.readouterr().out
    assert "| ece | brier | scaled_nll |" in tables
    brier = [found["both", seed]["brier"] for seed in (1, 2)]
    assert f"| {np.mean(brier):.3f} ± {np.std(brier, ddof=1):.3f} |" in tables


def test_flags_of_each_arm():
    assert arms.arm_flags("smooth_twice", 4.0)[-1] == "8.0" and arms.arm_flags("both", 4.0)[-1] == "4.0"
    assert arms.arm_flags("two_pass", 4.0)[1] == "1e-9" and arms.arm_flags("alpha=0.5", 4.0)[1] == "0.5"


def test_same_rows_order_and_initial_weights_for_each_arm(argv, tmp_path, monkeypatch):
    """What the script itself trains and evaluates on, batch by batch, and the weights that it begins with."""
    compute_loss = train_rdrop.RDropTrainer.compute_loss

    def record(trainer, model, inputs, *args, **kwargs):
        if not seen:
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        batch = [inputs["input_ids"].tolist(), inputs["labels"].tolist()]
        seen.append((model.training, batch))
        return compute_loss(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(train_rdrop.RDropTrainer, "compute_loss", record)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # which the script sets
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    encoder = tmp_path / "encoder"  # without a head
    shutil.copytree(argv[1], encoder)
    RobertaModel.from_pretrained(encoder).save_pretrained(encoder)
    argv[1] = encoder
    flags = [*map(str, argv), "--max_train_samples", "48", "--max_eval_samples", "20", "--validation_fraction", "0.1"]
    runs = {}
    for number, (arm, seed) in enumerate([*[(arm, 1) for arm in (*arms.ARMS, "alpha=2")], ("ce", 2)]):
        seen = runs[arm, seed] = []
        train_rdrop.main(arms.run_flags(arm, seed, flags, 1, tmp_path / str(number)))

    weights, *batches = runs["ce", 1]
    training = [batch for is_training, batch in batches if is_training]
    evaluation = [batch for is_training, batch in batches if not is_training]
    assert sum(len(labels) for _, labels in training) == 48 and len(evaluation) == 6, "one epoch; 20 rows thrice"
    for arm in (*arms.ARMS, "alpha=2"):
        other_weights, *other = runs[arm, 1]
        assert other_weights.keys() == weights.keys() and any("classifier" in name for name in weights)
        assert all(weights[name].equal(tensor) for name, tensor in other_weights.items()), arm
        assert [batch for is_training, batch in other if is_training][:3] == training, arm
        assert [batch for is_training, batch in other if not is_training][-4:] == evaluation[-4:], arm
    other_weights, *other = runs["ce", 2]
    head = "classifier.out_proj.weight"
    assert not other_weights[head].equal(weights[head]) and [batch for _, batch in other] != [
        batch for _, batch in batches
    ]


def test_unknown_arm_is_named():
    command = [sys.executable, ROOT / "tests" / "experiments" / "arms.py", "--arms", "booth"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "no arm is called booth" in run.stderr
