"""Tests of the measuring tools: `pytest tests/experiments`. Those of the plots are skipped without matplotlib."""

import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import DatasetDict
from scipy import special, stats
from sklearn.metrics import log_loss
from transformers import RobertaModel

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "experiments")]
import arms  # noqa: E402
import benchmark  # noqa: E402
import noisy  # noqa: E402
import tiny_imdb  # noqa: E402

import train_rdrop  # noqa: E402

BY_SEED = "--train_file train_{{seed}}.csv@{} --max_length 64 --num_train_epochs {} --use_cpu"


def write_csv(file, runs, **figures):
    """Write made-up runs: for each (setting, arm, seed) random figures, except those given."""
    rng = np.random.default_rng(0)
    for setting, arm, seed in runs:
        line = dict(zip(arms.NUMBERS, rng.uniform(0.4, 0.9, len(arms.NUMBERS)), strict=True)) | figures
        line |= {"arm": arm, "seed": seed, "flags": setting, "machine": "EPYC", "best_epoch": 4}
        arms.keep(file, line | {"kl": "1 3" if arms.terms_of(arm)[0] else ""})
    return arms.read(file)


def differences(found, one, two, name="f1"):
    return [100 * (run[name] - found[two, seed][name]) for (arm, seed), run in found.items() if arm == one]


def test_interval_and_power_agree_with_scipy():
    values = np.random.default_rng(0).normal(0.004, 0.01, 8)
    for confidence in (0.95, 0.999):
        mean, width = arms.paired(values, confidence)
        interval = stats.ttest_1samp(values, 0).confidence_interval(confidence)
        assert (mean - width, mean + width) == pytest.approx(tuple(interval))
    n = arms.seeds_needed(values.std(ddof=1), 0.005)
    draws = np.random.default_rng(1).normal(0.005, values.std(ddof=1), (4000, n))
    assert 0.77 < (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean() < 0.85
    assert arms.needed(values).startswith(f"{n} (")


def test_verdicts_follow_the_plan():
    assert arms.holm([0.03, 0.02]) == pytest.approx([0.04, 0.04])
    assert arms.holm([0.6, 0.01]) == pytest.approx([0.6, 0.02])
    assert arms.holm([0.6, 0.01, 0.02]) == pytest.approx([0.6, 0.03, 0.04])
    small, large = [0.001, 0.002, 0.003], [0.01, -0.02, 0.03]
    assert arms.verdict(small, 0.04, 0.012) == "helps"
    assert arms.verdict([-value for value in small], 0.04, 0.012) == "harms"
    assert arms.verdict(small, 0.06, 0.012) == "no gain of the published size"
    assert arms.verdict(large, 0.6, 0.012) == "undecided"


def test_calibration_agrees_with_scikit_learn_and_a_count_by_hand():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (3000, 3))
    labels = np.array([rng.choice(3, p=p) for p in special.softmax(logits, axis=-1)])
    assert arms.nll(logits, labels) == pytest.approx(log_loss(labels, special.softmax(logits, axis=-1)))
    assert arms.fitted_temperature(4 * logits, labels) == pytest.approx(4, abs=0.24)
    # two bins: confidences 0.6, 0.7 (wrong, right) and 0.8, 0.9 (right, wrong)
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    by_hand = 0.5 * abs(1 / 2 - 0.65) + 0.5 * abs(1 / 2 - 0.85)
    assert arms.calibration_error(p, np.ones(4), bins=2) == pytest.approx(by_hand)


def test_setting_names_contents(tmp_path):
    names = []
    for folder in ("one", "two", "three"):
        (tmp_path / folder / "model").mkdir(parents=True)
        (tmp_path / folder / "model" / "weights").write_text("other" if folder == "three" else "same")
        names.append(arms.name_of([f"--model_name_or_path={tmp_path / folder / 'model'}/", "--max_length", "64"]))
        (tmp_path / folder / "model" / ".cache").write_text(folder)
    assert names[0] == names[1] != names[2] and names[0].startswith("--model_name_or_path model@")
    files = arms.name_of(["--train_file", f"{tmp_path}/one/model/train_{{seed}}.csv"])
    assert files == f"--train_file train_{{seed}}.csv@{arms.contents(tmp_path / 'one' / 'model')}"
    assert arms.name_of(["--model_name_or_path", "owner/model"]) == "--model_name_or_path owner/model"


def test_show_prints_settings_separately(tmp_path, capsys):
    base, longer = "--model_name_or_path m", "--model_name_or_path m --config_overrides dropout=0.3"
    runs = [(setting, arm, seed) for setting in (base, longer) for arm in ("smooth", "both") for seed in (1, 2, 3)]
    settings = write_csv(tmp_path / "a.csv", runs + [(base, "alpha=2", seed) for seed in (1, 2)])
    arms.main(["--show", "--csv", str(tmp_path / "a.csv")])
    first, second = capsys.readouterr().out.split("Setting: ")[1:]
    named, alphas = first.split("by the seeds [1, 2] alone")
    f1 = [100 * settings[base]["smooth", seed]["f1"] for seed in (1, 2, 3)]
    assert f"| {np.mean(f1):.2f} ± {np.std(f1, ddof=1):.2f} |" in named
    gain = differences(settings[base], "both", "smooth")
    low, high = stats.ttest_1samp(gain, 0).confidence_interval(0.95)
    assert f"| {np.mean(gain):+.2f} ± {(high - low) / 2:.2f} ({sum(d > 0 for d in gain)}) |" in named
    assert "KL by epoch, both: 1.0000, 3.0000" in named and "KL by epoch, smooth" not in named
    assert alphas.index("| smooth |") < alphas.index("| alpha=2 |") < alphas.index("| both |")
    change = np.subtract(differences(settings[longer], "both", "smooth"), gain).mean()
    _, _, changes = second.partition("Changed by --config_overrides dropout=0.3")
    assert f"| {change:+.2f} ± " in changes.split("| both - smooth | 3 |")[1]


def test_show_hides_a_question_until_its_last_run(tmp_path, capsys):
    setting, file = BY_SEED.format("0123abcd", 10), tmp_path / "a.csv"
    runs = [(setting, arm, seed) for seed in range(42, 66) for arm in ("ce", "smooth", "both", "two_pass")]
    write_csv(file, runs[:-1])
    arms.main(["--show", "--csv", str(file)])
    assert capsys.readouterr().out.splitlines() == [f"Setting: {setting}", "95 of 96 runs", ""]
    found = write_csv(file, runs[-1:])[setting]
    arms.main(["--show", "--csv", str(file)])
    shown = capsys.readouterr().out
    gains = {name: differences(found, "both", "ce", name) for name in ("f1", "auc")}
    ps = {name: stats.ttest_1samp(gain, 0).pvalue for name, gain in gains.items()}
    for name, p in ps.items():
        corrected = max(p, 2 * min(ps.values()))
        width = arms.paired(gains[name])[1]
        assert (
            f"| {name} of both - ce | 24 | {np.mean(gains[name]):+.2f} ± {width:.2f} | {p:.4f} | {corrected:.4f} |"
            in shown
        )


def test_show_pools_settings_that_differ_only_in_files_of_each_seed(tmp_path, capsys):
    old, new, file = BY_SEED.format("0123abcd", 6), BY_SEED.format("4567cdef", 6), tmp_path / "a.csv"
    runs = [(old, arm, seed) for arm in ("ce", "smooth", "rdrop", "both") for seed in range(42, 54)]
    runs += [(new, arm, seed) for arm in ("smooth", "both", "two_pass") for seed in range(54, 78)]
    write_csv(file, runs[:-1])
    arms.main(["--show", "--csv", str(file)])
    shown = capsys.readouterr().out
    assert "| both - smooth | 12 |" in shown and "71 of 72 runs" in shown and "Pooled" not in shown
    settings = write_csv(file, runs[-1:])
    arms.main(["--show", "--csv", str(file)])
    apart, pooled = capsys.readouterr().out.split("Pooled: ")
    gain = differences(settings[old], "both", "smooth") + differences(settings[new], "both", "smooth")
    assert "| both - smooth | 36 | " in pooled and f"| {np.mean(gain):+.2f} ± " in pooled
    assert "| both - smooth | 24 |" in apart and "two_pass" not in pooled and "| ce |" not in pooled


def test_show_prints_the_numbers_of_the_page(capsys):
    """Each cell of a row of results in README.md appears in one printed row."""
    arms.main(["--show"])
    printed = capsys.readouterr().out.splitlines()
    names = {*arms.ARMS, *(f"{one} - {two}" for one, two in arms.PAIRS)}
    rows = [
        line.strip("| ").split(" | ") for line in Path(ROOT, "tests/experiments/README.md").read_text().splitlines()
    ]
    rows = [row for row in rows if len(row) > 2 and (row[0] in names or row[0].startswith("alpha="))]
    assert rows
    for name, *cells in rows:
        same = [line for line in printed if line.startswith(f"| {name} |")]
        assert any(all(f"| {value} " in line for value in cells) for line in same), (name, cells)


def test_noisy_flips_labels_of_train_alone(tmp_path):
    imdb = DatasetDict(train=tiny_imdb.make_reviews(80, seed=5), test=tiny_imdb.make_reviews(60, seed=6))
    truth = {(split, row["text"]): ("neg", "pos")[row["label"]] for split, rows in imdb.items() for row in rows}
    noisy.write(tmp_path, imdb, 1, train=40, noisy=8, validation=30, test=50)
    drawn = {split: pd.read_csv(tmp_path / f"{split}_1.csv") for split in ("train", "validation", "test")}
    for split, expected in {"train": (40, 8), "validation": (30, 0), "test": (50, 0)}.items():
        source = "test" if split == "test" else "train"
        wrong = sum(truth[source, row.text] != row.label for row in drawn[split].itertuples())
        assert (len(drawn[split]), wrong) == expected
    assert not set(drawn["train"]["text"]) & set(drawn["validation"]["text"])


def test_comparison_resumes_and_arms_share_batches_and_weights(tmp_path, monkeypatch, capsys):
    starts, limit = [], 2

    def call(command, log, device=None):
        script, *argv = map(str, command)
        if script == str(arms.SCRIPT):
            starts.append((argv[argv.index("--train_file") + 1], argv[argv.index("--rdrop_alpha") + 1]))
            if len(starts) > limit:
                raise KeyboardInterrupt
        with contextlib.redirect_stdout(io.StringIO()) as output:
            train_rdrop.main(argv) if script == str(arms.SCRIPT) else arms.measure(argv[1:])
        return output.getvalue(), 1.0

    def record(trainer, model, inputs, *args, **kwargs):
        if model.training:
            begin = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            run = seen.setdefault((trainer.args.seed, trainer.rdrop_loss.alpha), (begin, []))
            run[1].append((inputs["input_ids"].tolist(), inputs["labels"].tolist()))
        return compute_loss(trainer, model, inputs, *args, **kwargs)

    seen, compute_loss = {}, train_rdrop.RDropTrainer.compute_loss
    monkeypatch.setattr(train_rdrop.RDropTrainer, "compute_loss", record)
    assert arms.call(["-c", "print(5)"], tmp_path / "log")[0] == "5\n"
    monkeypatch.setattr(arms, "call", call)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # set by the script
    tiny_imdb.write_model(tmp_path / "model")
    RobertaModel.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "model")  # without a head
    imdb = DatasetDict(train=tiny_imdb.make_reviews(80, seed=5), test=tiny_imdb.make_reviews(60, seed=6))
    (tmp_path / "data").mkdir()
    for seed in (1, 2):
        noisy.write(tmp_path / "data", imdb, seed, train=32, noisy=4, validation=16, test=32)
    flags = ["--model_name_or_path", f"{tmp_path}/model", "--num_train_epochs", "1", "--use_cpu"]
    for split in ("train", "validation", "test"):
        flags += [f"--{split}_file", f"{tmp_path}/data/{split}_{{seed}}.csv"]
    argv = ["--arms", "ce", "both", "--seeds", "1", "2", "--csv", f"{tmp_path}/a.csv", *flags]
    with pytest.raises(KeyboardInterrupt):
        arms.main(argv)
    assert starts[:2] == [(f"{tmp_path}/data/train_1.csv", "0"), (f"{tmp_path}/data/train_1.csv", "5")]
    kept, limit = Path(tmp_path, "a.csv").read_text(), 4
    starts.clear()
    arms.main(argv)
    assert Path(tmp_path, "a.csv").read_text().startswith(kept)
    assert starts == [(f"{tmp_path}/data/train_2.csv", "0"), (f"{tmp_path}/data/train_2.csv", "5")]
    assert "| both - ce | 2 |" in capsys.readouterr().out
    ((setting, found),) = arms.read(tmp_path / "a.csv").items()
    assert setting == arms.name_of(flags)
    for (arm, _), run in found.items():
        assert bool(run["kl"]) == (arm == "both") and run["best_epoch"] == 1 and run["scaled_nll"] > 0
    for seed in (1, 2):
        (weights, batches), (others, same) = seen[seed, 0], seen[seed, 5]
        assert len(batches) == 2 and batches == same and all(weights[name].equal(others[name]) for name in weights)
    head = "classifier.out_proj.weight"
    assert seen[1, 0][1] != seen[2, 0][1] and not seen[1, 0][0][head].equal(seen[2, 0][0][head])


def test_benchmark_measures_all_variants(capsys):
    benchmark.main(["--repeats", "1", "--max_train_samples", "32", "--max_eval_samples", "16"])
    shown = capsys.readouterr().out
    assert all(shown.count(f"\n| {variant} |") == 2 for variant in benchmark.VARIANTS)


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    import plots
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "run") as writer:
        for tag in plots.PANELS:
            for step in (10, 20):
                writer.add_scalar(tag, 1 / step, step)
    runs = [("--max_length 128", arm, seed) for arm in ("both", "ce", "two_pass") for seed in (1, 2, 3)]
    write_csv(tmp_path / "a.csv", [*runs, (BY_SEED.format("0123abcd", 10), "both", 42)])
    plots.main(["curves", f"{tmp_path}/run", "--output_dir", str(tmp_path)])
    plots.main(["forest", "--csv", f"{tmp_path}/a.csv", "--output_dir", str(tmp_path)])
    forest = (tmp_path / "forest.svg").read_text()
    assert "both - two_pass" in forest and "100 reviews" not in forest
    assert all(title in (tmp_path / "curves.svg").read_text() for title in plots.PANELS.values())
