"""Does R-Drop help? Train several arms over several seeds with train_rdrop.py, and compare them seed by seed.

    python tests/experiments/arms.py --show          # print the tables of all finished runs; starts nothing
    python tests/experiments/arms.py --csv mine.csv --seeds 42 43 44 45 46 --jobs 2 \\
        --dataset_name FOLDER_OR_HUB_ID --validation_fraction 0.1

All flags except those listed below are passed on to train_rdrop.py and are part of the setting of a run. Each finished
run becomes a line of the CSV file, so an interrupted command can simply be repeated: it runs what is missing and then
prints the tables. Runs with the same seed share their rows, their order and the initial weights; differences between
arms are therefore taken seed by seed.

Arms: ce, smooth, rdrop, both (alpha 0 or 5, label smoothing 0 or 0.1); smooth_twice (smoothing, twice the epochs: about
the cost of both); two_pass (smoothing, alpha 1e-9: its KL shows how much the passes of the plain model disagree);
alpha=A (smoothing and that alpha). No arm stops early; the flags decide which epoch is evaluated.

A setting identifies local files and folders by name and a hash of their contents; a Hub id is kept as it is. {seed} in
a path, as in --train_file noisy/train_{seed}.csv, stands for the seed of the run, and the hash is that of the folder.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import queue
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

SCRIPT = Path(__file__).resolve().parents[2] / "train_rdrop.py"
CSV = Path(__file__).with_suffix(".csv")
ARMS = {  # alpha and label smoothing
    "ce": (0, 0),
    "smooth": (0, 0.1),
    "rdrop": (5, 0),
    "both": (5, 0.1),
    "smooth_twice": (0, 0.1),
    "two_pass": (1e-9, 0.1),
}
PAIRS = [("both", "ce"), ("both", "smooth"), ("both", "smooth_twice"), ("both", "two_pass")]
PAIRS += [("rdrop", "ce"), ("rdrop", "smooth"), ("smooth", "ce"), ("two_pass", "smooth"), ("smooth_twice", "smooth")]
SHARES = ["accuracy", "f1", "auc"]  # shown in percent
FIGURES = [*SHARES, "eval_loss", "train_nll", "test_nll", "gap"]  # in nats; the gap is test_nll - train_nll
CALIBRATION = ["ece", "brier", "scaled_nll"]  # missing in older runs
TIMES = ["train_seconds", "cpu_seconds"]
COLUMNS = ["arm", "seed", "flags", *FIGURES[:-1], "best_epoch", "kl", *TIMES, "machine", *CALIBRATION, "temperature"]
NUMBERS = [*FIGURES[:-1], "best_epoch", *TIMES, *CALIBRATION]
PUBLISHED = {"f1": 0.012, "auc": 0.008}  # the gains that the article claims
NOTES = """
Shares in percent, losses in nats; gap: test_nll - train_nll; times: medians; CPU time: mean ratio of a seed's two runs.
±: standard deviation of arms, half of the 95 % interval (t) of differences. Brackets: seeds in favour of the first.
eval_loss is compared where both arms use smoothing; elsewhere it is a different loss, or test_nll again. needed: number
of seeds with which 80 % of such comparisons would show half a point of F1 (brackets: 95 % interval of that number)."""
RUNNING = []  # processes, to be ended with this one


class Question(NamedTuple):
    """Planned runs on files of their own for each seed. The primary contrasts are F1 and AUC of both - `baseline`."""

    title: str
    epochs: int
    arms: str
    seeds: range
    baseline: str

    def runs(self):
        return [(arm, seed) for arm in self.arms.split() for seed in self.seeds]


QUESTIONS = [  # as planned in README.md
    Question("1 (whose plan named F1 alone, and no such rules)", 6, "ce smooth rdrop both", range(42, 54), "smooth"),
    Question("4", 6, "smooth both two_pass", range(54, 78), "smooth"),
    Question("5", 10, "ce smooth both two_pass", range(42, 66), "ce"),
]


def terms_of(arm):
    """Alpha and label smoothing of `arm`."""
    return ARMS[arm] if arm in ARMS else (float(arm.removeprefix("alpha=")), 0.1)


def arm_name(name):
    terms_of(name)
    return name


def contents(path):
    """A short hash of a file, or of the names and contents of all files in a folder, except hidden ones."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            with open(file, "rb") as opened:
                digest.update(f"{name}\n".encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:8]


def name_of(flags):
    """The setting: `flags`, with local models and data by name and hash, as their paths differ between machines."""
    words = [word for flag in flags for word in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    for i, (flag, value) in enumerate(zip(words, words[1:], strict=False), 1):
        if re.fullmatch("--(model.name.or.path|dataset.name|(train|validation|test).file)", flag):
            path = Path(value).resolve()
            held = path.parent if "{seed}" in path.name else path
            words[i] = f"{path.name}@{contents(held)}" if held.exists() else value
    return " ".join(words)


def call(command, log, device=None):
    """Run `command` on one thread of a CPU or on the GPU `device`; returns what it has printed, and CPU seconds."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
    with open(log, "w+") as output:
        process = subprocess.Popen([sys.executable, *command], env=env, stdout=output, stderr=output)
        RUNNING.append(process)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = output.read()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with status {process.returncode}: {said[-2000:]}")
    return said, usage.ru_utime + usage.ru_stime


def run_flags(arm, seed, flags, epochs, folder):
    """All flags of train_rdrop.py for the run of `arm` with `seed`, which writes into `folder`."""
    alpha, smoothing = terms_of(arm)
    argv = [flag.replace("{seed}", str(seed)) for flag in flags]
    argv += ["--rdrop_alpha", str(alpha), "--label_smoothing_factor", str(smoothing), "--seed", str(seed)]
    argv += ["--num_train_epochs", str(2 * epochs if arm == "smooth_twice" else epochs)]
    argv += ["--early_stopping_patience", "0"]
    argv += ["--output_dir", f"{folder}/results", "--logging_dir", str(folder), "--report_to", "none"]
    return [*argv, "--logging_strategy", "epoch", "--save_total_limit", "1", "--disable_tqdm", "true"]


def train_once(arm, seed, flags, setting, epochs, devices):
    """Train and measure `arm` with `seed` on one of `devices`; returns a line of the CSV file."""
    device = devices.get()
    try:
        with tempfile.TemporaryDirectory() as folder:
            output_dir, log = f"{folder}/results", f"{folder}/log"
            argv = run_flags(arm, seed, flags, epochs, folder)
            _, seconds = call([SCRIPT, *argv], log, device)
            results = json.loads(Path(output_dir, "all_results.json").read_text())
            state = json.loads(Path(output_dir, "trainer_state.json").read_text())
            said, _ = call([__file__, "--measure", *argv, "--model_name_or_path", output_dir], log, device)
    finally:
        devices.put(device)
    prefix = "test" if "test_f1" in results else "eval"
    kls = [entry["kl"] for entry in state["log_history"] if "kl" in entry and terms_of(arm)[0] > 0]
    line = {"arm": arm, "seed": seed, "flags": setting, **{name: results[f"{prefix}_{name}"] for name in SHARES}}
    line |= {"eval_loss": results[f"{prefix}_loss"], "best_epoch": round(results["best_epoch"])}
    line |= {"kl": " ".join(f"{kl:.3g}" for kl in kls), "train_seconds": results["train_runtime"]}
    return line | {"cpu_seconds": round(seconds, 1)} | json.loads(said.splitlines()[-1])


def nll(logits, labels, temperature=1.0):
    """Mean negative log-likelihood, in nats, of `labels` (n) by `logits` (n, classes) over a temperature."""
    log_p = special.log_softmax(logits / temperature, axis=-1)
    return -np.mean(log_p[np.arange(len(labels)), labels])


def fitted_temperature(logits, labels):
    """The temperature, between 1/20 and 20, that minimizes the NLL (Guo et al., 2017, arXiv 1706.04599)."""
    bounds = np.log([1 / 20, 20])
    found = optimize.minimize_scalar(lambda t: nll(logits, labels, np.exp(t)), bounds=bounds, method="bounded")
    return float(np.exp(found.x))


def calibration_error(p, labels, bins=15):
    """Expected calibration error of probabilities (n, classes), with bins of equal mass by confidence."""
    confidence = p.max(axis=-1)
    overconfidence = confidence - (p.argmax(axis=-1) == labels)
    by_confidence = np.argsort(confidence, kind="stable")
    gaps = [abs(overconfidence[rows].sum()) for rows in np.array_split(by_confidence, bins)]
    return float(np.sum(gaps) / len(labels))


def measure(argv):
    """Print what a run does not report itself: NLL of train and test without smoothing and dropout, and calibration.

    Test figures come from `predictions.csv`. The temperature is fitted on the validation split, if there is one.
    """
    from sklearn.metrics import brier_score_loss
    from transformers import DataCollatorWithPadding, Trainer

    from train_rdrop import load_model, load_splits, load_tokenizer, parse_args, tokenize

    args = parse_args(argv)
    tokenizer = load_tokenizer(args)
    splits = load_splits(args, args.seed)
    names = splits["train"].features["labels"].names
    data = tokenize(splits, tokenizer)
    model = load_model(args, names)
    trainer = Trainer(model, args, DataCollatorWithPadding(tokenizer), eval_dataset=data["train"])
    logits, labels, _ = trainer.predict(data["train"])
    line = {"train_nll": nll(logits.astype(float), labels)}
    with open(Path(args.output_dir, "predictions.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    p = np.array([[float(row[f"p_{name}"]) for name in names] for row in rows])
    labels = np.array([names.index(row["label"]) for row in rows])
    line |= {"test_nll": nll(np.log(p), labels), "machine": machine(), "ece": calibration_error(p, labels)}
    line["brier"] = brier_score_loss(labels, p, labels=range(len(names)))
    if "validation" in data and "test" in data:
        temperature = fitted_temperature(*trainer.predict(data["validation"])[:2])
        line |= {"scaled_nll": nll(np.log(p), labels, temperature), "temperature": temperature}
    print(json.dumps(line))


def machine():
    """Processor or GPU, and the versions of the libraries that determine the figures."""
    import torch
    import transformers

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (names or [platform.processor()])[0]
    return f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"


def read(file):
    """The finished runs of each setting: {setting: {(arm, seed): line}}, with figures as numbers."""
    found = {}
    if file.exists():
        with open(file, newline="") as lines:
            for line in csv.DictReader(lines):
                figures = {name: float(line[name] or math.nan) for name in NUMBERS}
                gap = figures["test_nll"] - figures["train_nll"]
                runs = found.setdefault(line["flags"], {})
                runs[line["arm"], int(line["seed"])] = {**line, **figures, "gap": gap}
    return found


def keep(file, line):
    """Append `line` to the CSV file."""
    new = not file.exists()
    with open(file, "a", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in line.items()})


def run_all(todo, options, flags, setting, epochs):
    """Run `todo`, `--jobs` at a time, and append each line to the CSV file as soon as its run has finished."""
    import torch

    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = gpus if gpus != [""] else [str(i) for i in range(torch.cuda.device_count())]
    devices = queue.SimpleQueue()
    for job in range(options.jobs):
        devices.put(gpus[job % len(gpus)] if gpus else None)
    begin = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [pool.submit(train_once, arm, seed, flags, setting, epochs, devices) for arm, seed in todo]
        try:
            for done, run in enumerate(as_completed(runs), 1):
                line = run.result()
                keep(options.csv, line)
                left = (time.monotonic() - begin) / done * (len(todo) - done)
                figures = f"{line['arm']}, seed {line['seed']}: F1 {line['f1']:.4f}"
                print(f"{done} of {len(todo)} runs; {figures}; about {left / 60:.0f} minutes left", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            for process in RUNNING:
                process.terminate()
            raise


def paired(differences, confidence=0.95):
    """Mean of the paired `differences` and half the width of its confidence interval (t distribution)."""
    n = len(differences)
    width = stats.t.ppf((1 + confidence) / 2, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return statistics.mean(differences), width


def excludes_zero(differences, confidence):
    mean, width = paired(differences, confidence)
    return abs(mean) > width


def holm(ps):
    """The p-values `ps`, corrected for their number by Holm's procedure."""
    order = np.argsort(ps)
    corrected = np.empty(len(ps))
    corrected[order] = np.maximum.accumulate(np.take(ps, order) * np.arange(len(ps), 0, -1)).clip(max=1)
    return corrected.tolist()


def verdict(differences, corrected_p, published):
    """What README.md's plan concludes from a primary contrast."""
    mean, width = paired(differences)
    if corrected_p < 0.05:
        return "helps" if mean > 0 else "harms"
    return "no gain of the published size" if published > mean + width else "undecided"


def seeds_needed(spread, effect):
    """The number of pairs with which a two-sided t test at 5 % detects `effect` in 80 % of the cases.

    `spread` is the standard deviation of the differences.
    """
    n = max(2, int((2.8 * spread / effect) ** 2) - 1)  # just below what the normal distribution requires
    while True:
        critical, shift = stats.t.ppf(0.975, n - 1), effect / spread * math.sqrt(n)
        if stats.nct.sf(critical, n - 1, shift) >= 0.8:
            return n
        n += 1


def needed(differences, effect=0.005):
    """`seeds_needed`, and its range over the 95 % interval of the standard deviation."""
    if len(differences) < 3 or np.ptp(differences) == 0:
        return "-"
    n, spread = len(differences) - 1, statistics.stdev(differences)
    low, high = (spread * math.sqrt(n / stats.chi2.ppf(p, n)) for p in (0.975, 0.025))
    return f"{seeds_needed(spread, effect)} ({seeds_needed(low, effect)}-{seeds_needed(high, effect)})"


def mean_and_std(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def cell(mean, width, name, sign=""):
    """`mean ± width` of the figure `name`: accuracy, F1 and AUC in percent, losses in nats."""
    scale, digits = (100, 2) if name in SHARES else (1, 3)
    spread = "" if math.isnan(width) else f" ± {scale * width:.{digits}f}"
    return f"{scale * mean:{sign}.{digits}f}{spread}"


def figures_of(found):
    """The figures that every run in `found` has."""
    return [*FIGURES, *(name for name in CALIBRATION if not any(math.isnan(run[name]) for run in found.values()))]


def table_head(*columns):
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def print_arms(found, arms, seeds):
    """Print the table of means and standard deviations."""
    figures = figures_of(found)
    print(table_head("arm", "seeds", *figures, "train s", "CPU s"))
    for arm in arms:
        runs = [found[arm, seed] for seed in seeds if (arm, seed) in found]
        if runs:
            cells = [cell(*mean_and_std([run[name] for run in runs]), name) for name in figures]
            times = [f"{statistics.median(run[name] for run in runs):.0f}" for name in TIMES]
            print(f"| {arm} | {len(runs)} | {' | '.join([*cells, *times])} |")


def difference(one, two):
    return {name: one[name] - two[name] for name in [*FIGURES, *CALIBRATION]}


def print_row(arms, differences, names, intervals, extra=()):
    """Print a row of `differences`, one dict of figures per seed, and add the compared values to `intervals`."""
    label, cells = " - ".join(arms), []
    for name in names:
        if name == "eval_loss" and not all(terms_of(arm)[1] for arm in arms):  # see NOTES
            cells.append("-")
            continue
        values = intervals[f"{label} {name}"] = [figures[name] for figures in differences]
        better = sum(d > 0 if name in SHARES else d < 0 for d in values)
        cells.append(f"{cell(*paired(values), name, sign='+')} ({better})")
    print(f"| {label} | {len(differences)} | {' | '.join([*cells, *extra])} |")


def print_correction(intervals):
    """Print how many of the `intervals` exclude zero, and which still do when corrected for their number."""
    clear, corrected = (
        [name for name, differences in intervals.items() if excludes_zero(differences, confidence)]
        for confidence in (0.95, 1 - 0.05 / len(intervals))
    )
    print(f"{len(clear)} of {len(intervals)} intervals exclude zero.", end=" ")
    print(f"Corrected for their number (Bonferroni): {'; '.join(corrected) or 'none'}")
    print(f"Lost by the correction: {'; '.join(name for name in clear if name not in corrected) or 'none'}")


def print_differences(found, arms, seeds):
    """Print the table of paired differences, and how many of its intervals exclude zero."""
    compared = [name for name in figures_of(found) if name != "train_nll"]  # less is neither better nor worse
    print(f"\n{table_head('difference', 'seeds', *compared, 'CPU time', 'needed')}")
    intervals, same_epoch = {}, []
    for one, two in PAIRS + [(arm, "smooth") for arm in arms if arm.startswith("alpha=")]:
        pairs = [(found[one, seed], found[two, seed]) for seed in seeds if {(one, seed), (two, seed)} <= found.keys()]
        if one not in arms or two not in arms or len(pairs) < 2:
            continue
        differences = [difference(*pair) for pair in pairs]
        ratio, width = paired([first["cpu_seconds"] / second["cpu_seconds"] for first, second in pairs])
        extra = f"{ratio:.2f} ± {width:.2f}", needed([figures["f1"] for figures in differences])
        print_row((one, two), differences, compared, intervals, extra)
        gaps = [first["gap"] - second["gap"] for first, second in pairs if first["best_epoch"] == second["best_epoch"]]
        if len(gaps) > 2:
            same_epoch.append(f"{one} - {two} {cell(*paired(gaps), 'gap', '+')} ({len(gaps)} seeds)")
    if not intervals:
        return
    print(NOTES)
    print_correction(intervals)
    if same_epoch:
        print(f"Gap in the seeds whose best epochs agree: {'; '.join(same_epoch)}")


def print_changes(found, base, arms, seeds):
    """Print how the runs in `found` differ from those in `base`, for each arm and for each difference between arms."""

    def contrast(runs, names, seed):
        first, *others = (runs[name, seed] for name in names)
        return difference(first, *others) if others else first

    names = [name for name in figures_of(found) if name in figures_of(base) and name != "train_nll"]
    print(f"\n{table_head('change', 'seeds', *names)}")
    intervals = {}
    for row in [*((arm,) for arm in arms), *PAIRS]:
        shared = [seed for seed in seeds if all((arm, seed) in runs for arm in row for runs in (found, base))]
        if len(shared) > 1:
            changes = [difference(contrast(found, row, seed), contrast(base, row, seed)) for seed in shared]
            print_row(row, changes, names, intervals)
    if intervals:
        print_correction(intervals)


def print_tables(found, arms, seeds):
    """Print all tables of the runs in `found`, and the KL of each arm by epoch."""
    print_arms(found, arms, seeds)
    print_differences(found, arms, seeds)
    for arm in arms:
        kls = [[float(kl) for kl in found[arm, seed]["kl"].split()] for seed in seeds if (arm, seed) in found]
        if kls and kls[0]:
            means = ", ".join(f"{np.mean(epoch):.4f}" for epoch in zip(*kls, strict=True))
            rising = sum(kl == sorted(kl) for kl in kls)
            print(f"KL by epoch, {arm}: {means} (the highest of a seed: {np.max(kls):.4f};", end=" ")
            print(f"never falling: {rising} of {len(kls)} seeds)")


def question_of(setting, found):
    """The question that the runs of a setting belong to, if any."""
    for question in QUESTIONS:
        by_seed = "{seed}" in setting and f"--num_train_epochs {question.epochs} " in f"{setting} "
        if by_seed and any(run in found for run in question.runs()):
            return question
    return None


def is_complete(setting, found):
    """Whether all planned runs are there, so that differences may be computed."""
    question = question_of(setting, found)
    return question is None or found.keys() >= set(question.runs())


def print_verdicts(question, found):
    """Print the tests of the primary contrasts and what README.md's plan concludes from them."""
    two, seeds = question.baseline, question.seeds
    contrasts = {name: [found["both", seed][name] - found[two, seed][name] for seed in seeds] for name in PUBLISHED}
    ps = [stats.ttest_1samp(differences, 0).pvalue for differences in contrasts.values()]
    print(f"\nPrimary contrasts of question {question.title}: paired t tests, two-sided; p corrected by Holm\n")
    print(table_head("contrast", "seeds", "difference", "p", "corrected p", "verdict"))
    for (name, differences), p, corrected in zip(contrasts.items(), ps, holm(ps), strict=True):
        cells = cell(*paired(differences), name, "+"), f"{p:.4f}", f"{corrected:.4f}"
        conclusion = verdict(differences, corrected, PUBLISHED[name])
        print(f"| {name} of both - {two} | {len(seeds)} | {' | '.join(cells)} | {conclusion} |")


def show(settings, wanted=None):
    """Print the tables of the setting `wanted`, or of all settings: named arms first, then the values of alpha.

    For a planned question with missing runs, only their number is printed.
    """
    for setting, found in settings.items():
        if wanted not in (None, setting):
            continue
        print(f"Setting: {setting}")
        question = question_of(setting, found)
        if not is_complete(setting, found):
            runs = question.runs()
            print(f"{sum(run in found for run in runs)} of {len(runs)} runs\n")
            continue
        for name in sorted({run["machine"] for run in found.values()}):
            print(f"Machine: {name}")
        print()
        seeds = sorted({seed for _, seed in found})
        arms = [arm for arm in ARMS if any((arm, seed) in found for seed in seeds)]
        print_tables(found, arms, seeds)
        if question:
            print_verdicts(question, found)
        for shorter, base in settings.items():
            if setting.startswith(f"{shorter} "):
                print(f"\nChanged by {setting.removeprefix(shorter).strip()}, in arms and in their differences")
                print_changes(found, base, arms, seeds)
        alphas = {arm for arm, _ in found if arm.startswith("alpha=")}
        if alphas:
            alphas |= {"smooth", "two_pass", "both"} & {arm for arm, _ in found}
            common = [seed for seed in seeds if all((arm, seed) in found for arm in alphas)]
            print(f"\nAlpha, with smoothing, by the seeds {common} alone\n")
            print_tables(found, sorted(alphas, key=terms_of), common)
        print()


def show_pooled(settings):
    """Print the tables of complete settings that differ only in the hash of files of each seed, pooled."""
    groups = {}
    for setting in settings:
        if is_complete(setting, settings[setting]):
            groups.setdefault(re.sub(r"(\{seed\}\S*)@\w+", r"\1", setting), []).append(setting)
    for name, members in groups.items():
        if len(members) > 1:
            shared = set.intersection(*({arm for arm, _ in settings[setting]} for setting in members))
            runs = {(arm, (member, seed)): run for member in members for (arm, seed), run in settings[member].items()}
            print(f"Pooled: {name}\n")
            print_tables(runs, [arm for arm in ARMS if arm in shared], sorted({seed for _, seed in runs}))
            print()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--show", action="store_true", help="print the tables of all settings in the CSV file, and exit"
    )
    options = {"nargs": "+", "type": arm_name, "default": list(ARMS), "metavar": "ARM"}
    parser.add_argument("--arms", **options, help="default: all but alpha=A")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44], help="default: 42 43 44")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time (default: 1)")
    parser.add_argument("--csv", type=Path, default=CSV, help="default: arms.csv next to this file")
    options, flags = parser.parse_known_args(argv)
    if options.show:
        if flags or not options.csv.exists():
            parser.error(f"--show cannot be combined with {flags}" if flags else f"{options.csv} does not exist")
        settings = read(options.csv)
        show(settings)
        show_pooled(settings)
        return
    from train_rdrop import parse_args

    epochs, setting = parse_args(flags).num_train_epochs, name_of(flags)
    found = read(options.csv).get(setting, {})
    todo = [(arm, seed) for seed in options.seeds for arm in options.arms if (arm, seed) not in found]
    if todo:
        run_all(todo, options, flags, setting, epochs)
    show(read(options.csv), setting)


if __name__ == "__main__":
    sys.path.insert(0, str(SCRIPT.parent))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also ends the runs
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
    else:
        main()
