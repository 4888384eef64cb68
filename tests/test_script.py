"""The script from start to end, as a user starts it, and what it leaves behind."""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import torch
from conftest import PRELUDES, ROOT, SCRIPT, Run, assert_same_end, predictions, scalars
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, classification_report, f1_score, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny_imdb import make_reviews
from transformers import AutoModel, AutoTokenizer, Trainer, pipeline

import train_rdrop

LINES = ("eval_loss", "eval_accuracy", "eval_f1", "eval_auc")
FIGURES = ("accuracy", "f1", "auc", "loss")
FEW = ("--max_train_samples", "64", "--max_eval_samples", "32")  # 4 steps an epoch
ODD = """it's "my" run"""  # a folder whose name a shell would take apart
LEFT_OUT = {3, 4, 11}  # rows of the files of `own` without text or label


@pytest.fixture(scope="module")
def short(tmp_path_factory, argv):
    """A short run with a validation part held out of train, into a folder whose name needs quotes."""
    flags = ("--validation_fraction", "0.1", "--max_train_samples", "64", "--num_train_epochs", "1")
    batches = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2")
    folder = ("--output_dir", ODD, "--positive_label", "neg")
    run = Run([*argv, *flags, *batches, *folder], tmp_path_factory.mktemp("short"), prelude="show_batches.py").wait()
    assert run.status == 0, run.err
    return run


@pytest.fixture(scope="module")
def own(tmp_path_factory, argv, tiny):
    """A short run on three files of the user's own, with an encoder that has no head yet: (run, labels of test)."""
    folder = tmp_path_factory.mktemp("own")
    AutoModel.from_pretrained(tiny / "model").save_pretrained(folder / "bare")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(folder / "bare")
    labels = {}
    for split, seed in (("train", 3), ("validation", 4), ("test", 5)):
        rows = make_reviews(40, seed).shuffle(seed)
        labels[split] = [("bad", "good, really")[label] for label in rows["label"]]
        labels[split][4] = ""
        texts = ["" if i in LEFT_OUT - {4} else text for i, text in enumerate(rows["text"])]
        lines = [f'"{text}","{label}"\n' for text, label in zip(texts, labels[split], strict=True)]
        (folder / f"{split}.csv").write_text("text,label\n" + "".join(lines))
    flags = [word for split in labels for word in (f"--{split}_file", f"{split}.csv")]
    flags += ["--model_name_or_path", "bare", "--max_eval_samples", "30", "--num_train_epochs", "3"]
    run = Run([*argv, *flags, "--learning_rate", "3e-3"], folder).wait()
    assert run.status == 0, run.err
    return run, labels["test"]


def events(folder):
    return EventAccumulator(str(folder)).Reload()


def hparams(folder):
    """What TensorBoard's HPARAMS tab shows of the run in `folder`."""
    content = events(folder).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams.items()
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values}


def text(folder, tag):
    """What TensorBoard's Text tab shows under `tag`."""
    return events(folder).Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()


def has_pr_curve(folder):
    found = events(folder)
    plugins = {tag: found.SummaryMetadata(tag).plugin_data.plugin_name for tag in found.Tags()["tensors"]}
    return "pr_curves" in plugins.values()


def the_only(folder):
    (path,) = folder.iterdir()
    return path


def recomputed(rows, positive=None):
    """Accuracy, F1 and AUC of the rows of predictions.csv, computed by scikit-learn from nothing else."""
    names = [column[2:] for column in rows[0] if column.startswith("p_")]
    labels, predicted = [[row[column] for row in rows] for column in ("label", "predicted")]
    chances = np.array([[float(row[f"p_{name}"]) for name in names] for row in rows])
    assert predicted == [names[i] for i in chances.argmax(axis=1)] and np.allclose(chances.sum(axis=1), 1)
    if positive is None:
        f1, auc = f1_score(labels, predicted, average="macro"), roc_auc_score(labels, chances, multi_class="ovr")
    else:
        f1 = f1_score(labels, predicted, pos_label=positive)
        auc = roc_auc_score([label == positive for label in labels], chances[:, names.index(positive)])
    return {"accuracy": accuracy_score(labels, predicted), "f1": f1, "auc": auc}


def assert_figures_of(figures, rows, prefix, positive=None):
    for name, value in recomputed(rows, positive).items():
        assert figures[f"{prefix}_{name}"] == value, name


def test_smoke(start, tmp_path):
    """The README's run without a Hub: it learns, and stops early."""
    assert start("tiny", base=(), script=ROOT / "tests" / "tiny_imdb.py").wait().status == 0
    base = ("--model_name_or_path", "tiny/model", "--dataset_name", "tiny/data", "--learning_rate", "3e-3")
    run = start("--num_train_epochs", "20", "--logging_steps", "5", base=base).wait()
    assert run.status == 0, run.err

    results = tmp_path / "results_rdrop"
    for name in ("arguments", "all_results", "train_results", "eval_results", "trainer_state", "tokenizer"):
        assert (results / f"{name}.json").is_file(), name
    metrics = run.json("all_results.json")
    assert metrics["eval_f1"] > 0.9 and metrics["eval_auc"] > 0.9 and metrics["eval_accuracy"] > 0.9

    # three evaluations that do not beat the best by more than 0.01 end the run, long before the 20th epoch
    state = run.json("trainer_state.json")
    *evals, final = [entry for entry in state["log_history"] if "eval_f1" in entry]
    f1 = [entry["eval_f1"] for entry in evals]
    best = max(range(len(f1)), key=lambda i: f1[i])
    assert metrics["epoch"] == len(f1) < 20 and len(f1) >= 4
    assert max(f1[-3:]) <= max(f1[:-3]) + 0.01
    assert metrics["eval_f1"] == f1[best] and state["best_global_step"] == 25 * (best + 1)
    assert metrics["eval_loss"] == final["eval_loss"] == evals[best]["eval_loss"]  # the model card shows the last
    assert len(list(results.glob("checkpoint-*"))) == 2

    # what stdout says before and after
    lines = run.out.splitlines()
    assert "train: 400 of 400 rows, {'neg': 200, 'pos': 200}" in lines
    assert "test: 100 of 100 rows, {'neg': 50, 'pos': 50}" in lines
    assert "effective batch 16, steps 0 to 500" in lines
    assert f"best: epoch {best + 1}, checkpoint-{25 * (best + 1)}, now in ./results_rdrop" in lines
    assert run.json("eval_results.json")["epoch"] == metrics["best_epoch"] == best + 1
    figures = ", ".join(f"{name} {metrics[f'eval_{name}']:.4f}" for name in FIGURES)
    (line,) = [line for line in lines if figures in line]
    assert "test, which also chose the checkpoint: optimistic" in line and "F1 and AUC of 'pos'" in line
    report = (results / "classification_report.txt").read_text()
    assert report in run.out and "'neg'" in report
    assert "tensorboard --logdir ./logs_rdrop" in run.out
    assert_figures_of(metrics, predictions(results), "eval", "pos")

    # curves, one folder a run
    folder = the_only(tmp_path / "logs_rdrop")
    assert re.fullmatch(r"results_rdrop_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.\d{6}", folder.name)
    logged = scalars(folder)
    steps = [step for step, _ in logged["train/loss"]]
    assert steps == list(range(5, 25 * len(f1) + 1, 5))
    for tag in ("train/ce", "train/kl", "train/learning_rate", "train/grad_norm"):
        assert [step for step, _ in logged[tag]] == steps, tag
    for (_, loss), (_, ce), (_, kl) in zip(logged["train/loss"], logged["train/ce"], logged["train/kl"], strict=True):
        assert loss == pytest.approx(ce + 5 * kl, rel=1e-4) and kl > 0
    for tag in ("eval/loss", "eval/accuracy", "eval/f1", "eval/auc"):  # once an epoch, never the best model again
        assert [step for step, _ in logged[tag]] == list(range(25, 25 * len(f1) + 1, 25)), tag
        assert [value for _, value in logged[tag]] == pytest.approx([entry[tag.replace("/", "_")] for entry in evals])
    assert '"rdrop_alpha": 5.0' in text(folder, "args") and '"model_name_or_path": "tiny/model"' in text(folder, "args")
    assert report in text(folder, "final") and has_pr_curve(folder)

    # the settings and final figures by which TensorBoard compares runs
    settings = {"alpha": 5, "smoothing": 0.1, "seed": 42, "learning_rate": 3e-3, "epochs": 20}
    settings |= {"model": "tiny/model", "data": "tiny/data"}
    shown = hparams(folder)
    assert "which also chose the checkpoint" in shown.pop("figures"), "not to be compared with a run's that has a test"
    assert shown == settings
    for name in FIGURES:
        assert [value for _, value in logged[f"final/{name}"]] == [pytest.approx(metrics[f"eval_{name}"])], name

    classify = pipeline("text-classification", model=str(results))
    assert classify("A wonderful superb film.")[0]["label"] == "pos"
    assert classify("An awful boring film.")[0]["label"] == "neg"
    assert classify("dull " * 500, truncation=True)[0]["label"] == "neg"


def test_start_lines_say_what_will_happen(short):
    lines = short.out.splitlines()
    (train,) = filter(None, (re.fullmatch(r"train: 64 of 400 rows, \{'neg': (\d+), 'pos': (\d+)\}", x) for x in lines))
    assert sum(map(int, train.groups())) == 64
    assert "test: 100 of 100 rows, {'neg': 50, 'pos': 50}" in lines
    assert "validation: 40 of 400 rows, {'neg': 20, 'pos': 20}" in lines  # held out of train's 400
    (epoch,) = re.findall("^TRAIN (.*)", short.out, re.M)
    tokens = sum(len(ids) for ids, _, _ in json.loads(epoch))
    assert f"train: {tokens} tokens; 0 texts are cut to 64" in lines
    assert "device cpu, mixed precision: no" in lines
    (method,) = [line for line in lines if line.startswith("alpha ")]
    assert "alpha 5.0, smoothing 0.1, dropout {" in method and "'hidden_dropout_prob': 0.1" in method
    assert "effective batch 8, steps 0 to 8" in lines


def test_start_line_counts_the_texts_that_are_cut(start, tiny):
    run = start(*FEW, "--max_length", "20", "--max_steps", "1").wait()
    assert run.status == 0, run.err
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    rows = train_rdrop.Dataset.from_parquet(str(tiny / "data" / "train.parquet"))
    drawn = rows.shuffle(seed=42).select(range(64))
    cut = sum(len(ids) > 20 for ids in tokenizer(drawn["text"][:])["input_ids"])
    assert f"; {cut} texts are cut to 20\n" in run.out and 0 < cut < 64


def test_summary_of_the_run_is_about_the_test_split(short):
    figures = short.json("all_results.json", ODD)
    folder = the_only(short.folder / "logs_rdrop")
    assert re.fullmatch(f"{ODD}_[-_0-9.]+", folder.name)
    logged = scalars(folder)
    for name in FIGURES:
        assert [value for _, value in logged[f"final/{name}"]] == [pytest.approx(figures[f"test_{name}"])], name
    assert {tag for tag in logged if tag.startswith("test/")} == set()
    assert hparams(folder)["figures"] == "test" and hparams(folder)["epochs"] == 1
    said = ", ".join(f"{name} {figures[f'test_{name}']:.4f}" for name in FIGURES)
    (line,) = [line for line in short.out.splitlines() if said in line]
    assert "test" in line and "F1 and AUC of 'neg'" in line and "optimistic" not in short.out
    assert "best: epoch 1, checkpoint-8, now in" in short.out
    assert_figures_of(figures, predictions(short.folder / ODD), "test", "neg")
    assert [int(row["row"]) for row in predictions(short.folder / ODD)] == list(range(100)), "in the file's order"


def test_predictions_name_the_rows_of_the_file(own):
    run, labels = own
    rows = predictions(run.folder / "results_rdrop")
    numbers = [int(row["row"]) for row in rows]
    assert numbers == sorted(set(numbers)) and len(numbers) == 30 and not LEFT_OUT & set(numbers)
    assert max(numbers) < 40 and min(numbers) >= 0
    assert [row["label"] for row in rows] == [labels[number] for number in numbers]
    assert list(rows[0]) == ["row", "label", "predicted", "p_bad", "p_good, really"]
    assert_figures_of(run.json("all_results.json"), rows, "test", "good, really")


def test_predictions_are_those_of_the_saved_model(own):
    run, _ = own
    with open(run.folder / "test.csv") as file:
        texts = [line.split('"')[1] for line in file.readlines()[1:]]
    classify = pipeline("text-classification", str(run.folder / "results_rdrop"), truncation=True, top_k=None)
    for row in predictions(run.folder / "results_rdrop")[:10]:
        for answer in classify([texts[int(row["row"])]])[0]:
            assert answer["score"] == pytest.approx(float(row[f"p_{answer['label']}"]), abs=1e-5)


def test_report_shows_each_class(own):
    run, _ = own
    rows = predictions(run.folder / "results_rdrop")
    columns = [[f"'{row[column]}'" for row in rows] for column in ("label", "predicted")]
    report = (run.folder / "results_rdrop" / "classification_report.txt").read_text()
    assert report == classification_report(*columns, digits=4, zero_division=0)
    folder = the_only(run.folder / "logs_rdrop")
    assert report in run.out and report in text(folder, "final") and has_pr_curve(folder)


def test_best_epoch_and_checkpoint_are_said(own):
    run, _ = own
    state, final = run.json("trainer_state.json"), run.json("eval_results.json")
    step = state["best_global_step"]
    (best,) = [entry for entry in state["log_history"] if entry["step"] == step and "eval_runtime" in entry][:1]
    assert f"best: epoch {best['epoch']:g}, checkpoint-{step}, now in ./results_rdrop" in run.out
    assert final["epoch"] == run.json("test_results.json")["epoch"] == best["epoch"]
    assert all(final[name] == best[name] for name in LINES)
    assert run.json("all_results.json")["epoch"] == 3, "those trained"


def test_no_bars_nor_reports_of_weights_are_shown(own):
    run, _ = own
    noise = ("Loading weights", "Writing model", "LOAD REPORT", "MISSING", "Creating CSV", "Warning", "warn")
    assert [word for word in noise if word in run.err] == []
    assert re.search("new weights, drawn with the seed: .*classifier.out_proj.weight", run.out)


def answer_of_the_last_line(run, monkeypatch):
    """What the line to try returns, in the folder in which the run was started."""
    monkeypatch.chdir(run.folder)
    (line,) = re.findall("^Try it: (.*)", run.out, re.M)
    return eval(line, {"pipeline": pipeline})


def test_line_to_try_works(short, monkeypatch):
    (answer,) = answer_of_the_last_line(short, monkeypatch)
    assert answer["label"] in ("neg", "pos")


def test_line_to_try_of_pairs_takes_two_texts(start, tmp_path, monkeypatch):
    rows = [f"{text},so it is,{label}" for text, label in (("a good film", 1), ("a dull film", 0)) * 4]
    (tmp_path / "pairs.csv").write_text("\n".join(["text,other,label", *rows]) + "\n")
    run = start("--train_file", "pairs.csv", "--test_file", "pairs.csv", "--text_pair_column", "other").wait()
    assert run.status == 0 and '"text_pair"' in run.out, run.err
    answer = answer_of_the_last_line(run, monkeypatch)
    assert "'label': " in str(answer)


def test_same_seed_same_figures_to_the_last_digit(start):
    flags = (*FEW, "--num_train_epochs", "2", "--output_dir")
    runs = [start(*flags, f"out{i}", "--seed", seed) for i, seed in enumerate("112")]
    assert [run.wait().status for run in runs] == [0, 0, 0]
    first, second, other = (run.json("all_results.json", f"out{i}") for i, run in enumerate(runs))
    names = (*LINES, "train_loss")
    assert {name: first[name] for name in names} == {name: second[name] for name in names}
    assert first["train_loss"] != other["train_loss"]
    first, second, _ = (load_file(run.folder / f"out{i}" / "model.safetensors") for i, run in enumerate(runs))
    assert all(first[name].equal(second[name]) for name in first)


def test_validation_part_chooses_and_the_test_split_is_evaluated_once(start):
    run = start("--validation_fraction", "0.1", "--num_train_epochs", "3", "--max_train_samples", "64").wait()
    assert run.status == 0, run.err
    state = run.json("trainer_state.json")
    tests = [entry for entry in state["log_history"] if "test_f1" in entry]
    evals = [entry for entry in state["log_history"] if "eval_f1" in entry]
    assert len(tests) == 1 and tests[0] is state["log_history"][-1] and len(evals) == 4
    results = run.json("all_results.json")
    assert results["eval_f1"] == max(entry["eval_f1"] for entry in evals) and "test_f1" in results
    assert run.json("test_results.json")["test_f1"] == results["test_f1"]
    assert f"f1 {results['test_f1']:.4f}" in run.out and "early stopping is disabled" not in run.err
    # 40 validation and 100 test samples
    assert round(results["test_samples_per_second"] * results["test_runtime"]) == pytest.approx(100, abs=2)


def test_test_split_is_not_mistaken_for_the_validation_part_with_persistent_workers(start):
    flags = ("--validation_fraction", "0.05", "--max_train_samples", "32", "--num_train_epochs", "1")
    workers = ("--dataloader_num_workers", "1", "--dataloader_persistent_workers", "--output_dir", "workers")
    plain, run = start(*flags), start(*flags, *workers)
    assert plain.wait().status == run.wait().status == 0, run.err
    for name in ("eval_loss", "test_loss", "test_auc"):
        assert run.json("all_results.json", "workers")[name] == plain.json("all_results.json")[name]


def test_metrics_do_not_depend_on_layout_and_batches(start):
    flags = ("--max_train_samples", "32", "--num_train_epochs", "1", "--max_eval_samples", "77")
    runs = [start(*flags, "--per_device_eval_batch_size", size, "--output_dir", f"out{size}") for size in ("7", "77")]
    assert [run.wait().status for run in runs] == [0, 0]
    small, large = (runs[0].json("all_results.json", f"out{size}") for size in ("7", "77"))
    assert {name: small[name] for name in LINES} == pytest.approx({name: large[name] for name in LINES}, rel=1e-5)


def test_second_run_finds_the_tokens_in_the_cache_and_logs_beside_the_first(start, tmp_path):
    for split, seed in (("train", 11), ("test", 12)):  # not seen by any other test
        (tmp_path / "fresh").mkdir(exist_ok=True)
        make_reviews(32, seed).to_parquet(tmp_path / "fresh" / f"{split}.parquet")
    flags = ("--dataset_name", "fresh", "--num_train_epochs", "1", "--output_dir")
    first = start(*flags, "one").wait()
    second = start(*flags, "two", "--learning_rate", "5e-4").wait()
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "Tokenizing" in first.err and "Tokenizing" not in second.err
    assert [folder.name[:4] for folder in sorted((tmp_path / "logs_rdrop").iterdir())] == ["one_", "two_"]


def test_three_classes_from_csv_with_names(start, tmp_path):
    (tmp_path / "data").mkdir()
    for split, seed in (("train", 3), ("test", 4)):
        rows = [(row["text"].strip("."), ("bad", "good")[row["label"]]) for row in make_reviews(60, seed)]
        rows += [("It was fine and " + text, "fair") for text, _ in rows[15:45]]
        (tmp_path / "data" / f"{split}.csv").write_text("review,stars\n" + "\n".join(map(",".join, rows)))
    flags = ("--dataset_name", "data", "--text_column", "review", "--label_column", "stars")
    run = start(*flags, "--num_train_epochs", "2").wait()
    assert run.status == 0, run.err
    assert run.json("config.json")["id2label"] == {"0": "bad", "1": "fair", "2": "good"}
    assert "train: 90 of 90 rows, {'bad': 30, 'fair': 30, 'good': 30}" in run.out.splitlines()
    assert "macro F1 and AUC" in run.out and not has_pr_curve(the_only(tmp_path / "logs_rdrop"))
    rows = predictions(tmp_path / "results_rdrop")
    assert [row["label"] for row in rows] == ["bad"] * 30 + ["good"] * 30 + ["fair"] * 30, "in the order of the file"
    assert_figures_of(run.json("all_results.json"), rows, "eval")


def test_fp16_skips_steps_that_overflow_learns_and_is_resumed_with_its_scaler(start, tmp_path):
    flags = ("--early_stopping_patience", "0", "--num_train_epochs", "4", "--save_total_limit", "9")
    # the first steps overflow: without a longer warmup, some seeds and processors do not learn
    flags += ("--learning_rate", "3e-3", "--warmup_steps", "0.3")
    fp16 = {"env": {"ACCELERATE_MIXED_PRECISION": "fp16"}, "prelude": "fp16_on_cpu.py"}
    whole = start(*flags, "--output_dir", "whole", **fp16).wait()
    assert whole.status == 0, whole.err
    shown = set(re.findall("^(?:LOGITS|LOSS) .*", whole.out, re.M))
    assert shown == {"LOGITS torch.float16", "LOSS torch.float32"}
    scales = [float(scale) for scale in re.findall("^SCALE (.*)", whole.out, re.M)]
    assert scales[0] == 2.0**24 and scales[1] == 2.0**23, "the first step has overflowed"
    assert len(scales) == 101 and 2.0**10 <= scales[-1] <= 2.0**20, "few more have"
    assert whole.json("all_results.json", "whole")["eval_f1"] > 0.9  # 0.67 at the most without learning

    shutil.copytree(tmp_path / "whole", tmp_path / "results_rdrop", ignore=shutil.ignore_patterns("checkpoint-100"))
    assert torch.load(tmp_path / "results_rdrop" / "checkpoint-75" / "scaler.pt")["scale"] == scales[75]
    resumed = start(*flags, "--resume_from_checkpoint", "last", **fp16).wait()
    assert resumed.status == 0 and "steps 75 to 100" in resumed.out, resumed.err
    assert [float(scale) for scale in re.findall("^SCALE (.*)", resumed.out, re.M)] == scales[75:]
    assert_same_end(whole, resumed, ("whole", "results_rdrop"))


def test_plain_baseline_logs_no_kl(start, tmp_path):
    run = start(*FEW, "--rdrop_alpha", "0", "--num_train_epochs", "1", "--logging_steps", "2").wait()
    assert run.status == 0, run.err
    logged = scalars(the_only(tmp_path / "logs_rdrop"))
    assert "train/kl" not in logged and [v for _, v in logged["train/ce"]] == [v for _, v in logged["train/loss"]]


def test_group_by_length_and_accumulation_and_bf16_run(start):
    flags = ("--train_sampling_strategy", "group_by_length", "--gradient_accumulation_steps", "2", "--bf16")
    run = start(*FEW, *flags, "--num_train_epochs", "1").wait()
    assert run.status == 0 and "mixed precision: bf16" in run.out, run.err


def test_unreachable_hub_ends_in_one_line(tmp_path):
    """The script without flags. huggingface_hub waits 23 s between its tries; here its sleep is short."""
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, PRELUDES / "impatient.py", SCRIPT]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1, run.stderr
    words = ("FacebookAI/roberta-base", "HF_ENDPOINT", "local folder", "http://127.0.0.1:9")
    assert all(word in run.stderr for word in words), run.stderr


def requirements():
    """The lines of requirements.txt that the script needs, without those for the tests."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "pytest"))]


def test_script_declares_the_requirements_itself():
    block = re.search(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", SCRIPT.read_text(), re.M)[1]
    declared = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    assert declared == {"requires-python": ">=3.11", "dependencies": requirements()}


def test_script_imports_only_what_it_declares():
    imported = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    declared = {re.split("[=<>]", line)[0] for line in requirements()}
    third_party = imported - sys.stdlib_module_names
    assert third_party <= {"sklearn" if name == "scikit-learn" else name for name in declared} and len(declared) == 7


def test_script_touches_nothing_private():
    def private(name):
        return name.startswith("_") and not name.startswith("__")

    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Attribute):
            assert not private(node.attr), f"line {node.lineno}"
        elif isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))]
            assert not any(private(method.name) for method in methods), node.name
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            assert not any(private(word.value) for word in node.args[1:2] if isinstance(word, ast.Constant))
    functions = [name for name, part in vars(train_rdrop.RDropTrainer).items() if inspect.isfunction(part)]
    assert {name for name in functions if hasattr(Trainer, name)} == {
        "__init__",
        "compute_loss",
        "floating_point_ops",
        "log",
    }
