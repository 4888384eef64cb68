"""The files that a run leaves behind agree with each other, with its data and with what the saved model says later."""

import numpy as np
import pandas as pd
import pytest
from conftest import FEW, predictions, read_json, same_weights, train
from sklearn.metrics import accuracy_score, classification_report, f1_score, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_imdb import NEUTRAL, make_reviews
from transformers import pipeline

NAMES = ["bad", "fair", "good, really"]


def write_reviews(file, count, seed, classes):
    """Reviews of 2 or 3 classes in random order, where row 3 has no text and row 4 no label."""
    reviews = make_reviews(count, seed).shuffle(seed)
    texts, labels = reviews["text"][:], [NAMES[2 * label] for label in reviews["label"]]
    if classes == 3:
        for row in range(0, count, 3):
            texts[row], labels[row] = " ".join(NEUTRAL[row % 7 :]), "fair"
    texts[3], labels[4] = " ", ""
    pd.DataFrame({"text": texts, "label": labels}).to_csv(file, index=False)


@pytest.fixture(scope="module", params=["two classes", "test lacks a class"])
def run(request, tmp_path_factory, argv):
    """The folder of a run on three files, the names of its classes, and whether there are two (bad is positive)."""
    folder = tmp_path_factory.mktemp("run")
    two = request.param == "two classes"
    for split, seed in (("train", 3), ("validation", 4), ("test", 5)):
        classes = 2 if two or (split, request.param) == ("test", "test lacks a class") else 3
        write_reviews(folder / f"{split}.csv", {"train": 120}.get(split, 40), seed, classes)
    flags = [word for split in ("train", "validation", "test") for word in (f"--{split}_file", folder / f"{split}.csv")]
    flags += ["--num_train_epochs", "3", "--learning_rate", "3e-3", "--logging_steps", "10"]
    flags += ["--per_device_train_batch_size", "8"]
    flags += ["--positive_label", "bad"] if two else []
    train(folder, *argv, *flags, "--max_eval_samples", "36", "--max_length", "30")
    return folder, [NAMES[0], NAMES[2]] if two else NAMES, two


def test_predictions_are_those_of_the_test_file(run):
    folder, names, _ = run
    rows, table = predictions(folder / "results"), pd.read_csv(folder / "test.csv")
    numbers = [int(row["row"]) for row in rows]
    assert len(rows) == 36 and numbers == sorted(set(numbers)) and not {3, 4} & set(numbers)
    assert [row["label"] for row in rows] == table["label"][numbers].tolist()
    for row in rows:
        p = {name: float(row[f"p_{name}"]) for name in names}
        assert sum(p.values()) == pytest.approx(1) and row["predicted"] == max(p, key=p.get)


def test_figures_and_report_are_those_of_the_predictions(run):
    folder, names, two = run
    rows = predictions(folder / "results")
    labels, predicted = ([row[column] for row in rows] for column in ("label", "predicted"))
    p = np.array([[float(row[f"p_{name}"]) for name in names] for row in rows])
    present = sorted(set(labels))
    figures = read_json(folder, "results", "test_results.json")
    assert figures["test_accuracy"] == accuracy_score(labels, predicted)
    if two:
        positive = [label == "bad" for label in labels]
        f1, auc = f1_score(labels, predicted, pos_label="bad"), roc_auc_score(positive, p[:, 0])
    else:
        f1 = f1_score(labels, predicted, labels=present, average="macro")
        auc = None
    assert figures["test_f1"] == pytest.approx(f1)
    assert figures.get("test_auc") == (auc and pytest.approx(auc))
    truth = np.array([[0.9 * (name == label) + 0.1 / len(names) for name in names] for label in labels])
    assert figures["test_loss"] == pytest.approx(-(truth * np.log(p)).sum(1).mean(), rel=1e-4), "smoothed by 0.1"
    report = (folder / "results" / "classification_report.txt").read_text()
    assert report == classification_report(labels, predicted, labels=present, digits=4, zero_division=0)
    assert two or f"{figures['test_f1']:.4f}" in next(line for line in report.splitlines() if "macro avg" in line)


def test_saved_model_predicts_the_same(run):
    folder, names, _ = run
    table = pd.read_csv(folder / "test.csv")
    classify = pipeline("text-classification", str(folder / "results"), truncation=True, top_k=None)
    rows = predictions(folder / "results")
    for row, answers in zip(rows, classify([table["text"][int(row["row"])] for row in rows]), strict=True):
        scores = {answer["label"]: answer["score"] for answer in answers}
        assert scores == {name: pytest.approx(float(row[f"p_{name}"]), abs=1e-5) for name in names}


def test_model_is_the_best_by_validation_and_test_is_evaluated_once(run):
    folder, _, _ = run
    state, figures = (read_json(folder, "results", name) for name in ("trainer_state.json", "all_results.json"))
    evaluations = [entry for entry in state["log_history"] if "eval_f1" in entry]
    best = state["best_global_step"]
    assert best and same_weights(folder / "results", folder / "results" / f"checkpoint-{best}")
    (chosen, again) = [entry for entry in evaluations if entry["step"] == best]
    assert all(chosen[name] == again[name] == figures[name] for name in ("eval_f1", "eval_accuracy", "eval_loss"))
    assert (
        figures["eval_f1"] == max(entry["eval_f1"] for entry in evaluations)
        and figures["best_epoch"] == chosen["epoch"]
    )
    assert sum("test_f1" in entry for entry in state["log_history"]) == 1
    assert read_json(folder, "results", "eval_results.json")["eval_f1"] == figures["eval_f1"]


def test_curves_and_final_figures_are_in_tensorboard(run):
    folder, _, two = run
    (logs,) = (folder / "logs").iterdir()
    found, kinds = {}, set()
    for file in logs.rglob("events.*"):
        events = EventAccumulator(str(file)).Reload()
        found |= {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        kinds |= set(events.Tags()["tensors"])
    figures = read_json(folder, "results", "test_results.json")
    assert found["final/f1"] == [pytest.approx(figures["test_f1"])]
    assert found["train/loss"][0] == pytest.approx(found["train/ce"][0] + 5.0 * found["train/kl"][0], rel=1e-4)
    assert len(found["eval/f1"]) >= 3 and ("final" in kinds) == two, "the precision-recall curve"


def test_the_same_seed_gives_the_same_run(finished, tmp_path, argv):
    figures = train(tmp_path, *argv, *FEW)
    assert same_weights(tmp_path / "results", finished) and predictions(tmp_path / "results") == predictions(finished)
    assert figures["eval_loss"] == read_json(finished, "all_results.json")["eval_loss"]
    assert not (finished / "test_results.json").exists(), "without validation data, test selects"


def test_other_ways_to_train_run(tmp_path, argv):
    flags = ["--train_sampling_strategy", "group_by_length", "--gradient_accumulation_steps", "2", "--bf16"]
    flags += ["--length_buckets", "4", "--validation_fraction", "0.1"]
    figures = train(tmp_path, *argv, *FEW, *flags)
    numbers = [int(row["row"]) for row in predictions(tmp_path / "results")]
    assert "eval_f1" in figures and "test_f1" in figures and len(numbers) == 32 and numbers == sorted(numbers)
