"""The script from start to end, as a user starts it, and what it leaves behind."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import SCRIPT, scalars
from safetensors.torch import load_file
from tiny_imdb import OPINION, make_reviews
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import pipeline

LINES = ("eval_loss", "eval_accuracy", "eval_f1", "eval_auc")


@pytest.fixture(scope="module", autouse=True)
def unreachable_hub(tmp_path_factory):
    """The script without flags, at a Hub that does not answer: huggingface_hub tries again for 23 s, so start it first."""
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    folder = tmp_path_factory.mktemp("unreachable")
    with subprocess.Popen(
        [sys.executable, SCRIPT], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        yield run
        run.kill()


def test_smoke(tiny, tmp_path, monkeypatch, capsys):
    """The README's run without a Hub, in a process of its own: it learns, and stops early."""
    (tmp_path / "tiny").symlink_to(tiny)
    flags = "--model_name_or_path tiny/model --dataset_name tiny/data --learning_rate 1e-3 --num_train_epochs 20"
    run = subprocess.run([sys.executable, SCRIPT, *flags.split(), "--logging_steps", "5"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

    results = tmp_path / "results_rdrop"
    for name in ("all_results.json", "train_results.json", "eval_results.json", "trainer_state.json", "model.safetensors", "tokenizer.json"):
        assert (results / name).is_file(), name
    metrics = json.loads((results / "all_results.json").read_text())
    assert metrics["eval_f1"] > 0.9 and metrics["eval_auc"] > 0.9 and metrics["eval_accuracy"] > 0.9

    # three evaluations that do not beat the best by more than 0.01 end the run, long before the 20th epoch
    state = json.loads((results / "trainer_state.json").read_text())
    f1 = [entry["eval_f1"] for entry in state["log_history"] if "eval_f1" in entry][:-1]
    best = max(range(len(f1)), key=lambda i: f1[i])
    assert metrics["epoch"] == len(f1) < 20 and len(f1) >= 4
    assert max(f1[-3:]) <= max(f1[:-3]) + 0.01
    assert metrics["eval_f1"] == f1[best] and state["best_global_step"] == 25 * (best + 1)
    assert len(list(results.glob("checkpoint-*"))) == 2

    # the summary on stdout can be followed
    assert re.search(r"Test split: accuracy \d\.\d{4}, f1 \d\.\d{4}, auc \d\.\d{4}", run.stdout)
    assert "tensorboard --logdir ./logs_rdrop" in run.stdout
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'python -c "(.*)"', run.stdout).group(1), {})
    assert re.search(r"'label': '(neg|pos)'", capsys.readouterr().out)

    # curves, one folder a run
    (folder,) = (tmp_path / "logs_rdrop").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.\d{3}", folder.name)
    logged = scalars(folder)
    steps = [step for step, _ in logged["train/loss"]]
    assert steps == list(range(5, 25 * len(f1) + 1, 5))
    for tag in ("train/ce", "train/kl", "train/learning_rate", "train/grad_norm"):
        assert [step for step, _ in logged[tag]] == steps, tag
    for (_, loss), (_, ce), (_, kl) in zip(logged["train/loss"], logged["train/ce"], logged["train/kl"]):
        assert loss == pytest.approx(ce + 5 * kl, rel=1e-4) and kl > 0
    for tag in ("eval/loss", "eval/accuracy", "eval/f1", "eval/auc"):
        assert len(logged[tag]) == len(f1) + 1, tag  # once an epoch, and the best model at the end
    texts = [EventAccumulator(str(file)).Reload() for file in folder.iterdir()]
    shown = b"".join(e.tensor_proto.string_val[0] for text in texts for tag in text.Tags()["tensors"] if "args" in tag for e in text.Tensors(tag))
    assert b'"rdrop_alpha": 5.0' in shown and b'"model_name_or_path": "tiny/model"' in shown

    classify = pipeline("text-classification", model=str(results))
    assert classify("A wonderful superb film.")[0]["label"] == "pos"
    assert classify("An awful boring film.")[0]["label"] == "neg"
    assert classify("dull " * 500, truncation=True)[0]["label"] == "neg"


def test_same_seed_same_figures_to_the_last_digit(start):
    runs = [start("--num_train_epochs", "2", "--output_dir", f"out{i}", "--seed", seed) for i, seed in enumerate("112")]
    assert [run.wait().status for run in runs] == [0, 0, 0]
    first, second, other = (run.json("all_results.json", f"out{i}") for i, run in enumerate(runs))
    assert {name: first[name] for name in (*LINES, "train_loss")} == {name: second[name] for name in (*LINES, "train_loss")}
    assert first["train_loss"] != other["train_loss"]
    first, second, _ = (load_file(run.folder / f"out{i}" / "model.safetensors") for i, run in enumerate(runs))
    assert all(first[name].equal(second[name]) for name in first)


def test_validation_part_chooses_and_the_test_split_is_evaluated_once(start, tmp_path):
    run = start("--validation_fraction", "0.1", "--num_train_epochs", "3").wait()
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
    flags = ("--validation_fraction", "0.05", "--num_train_epochs", "1")
    workers = ("--dataloader_num_workers", "1", "--dataloader_persistent_workers", "--output_dir", "workers")
    plain, run = start(*flags), start(*flags, *workers)
    assert plain.wait().status == run.wait().status == 0, run.err
    for name in ("eval_loss", "test_loss", "test_auc"):
        assert run.json("all_results.json", "workers")[name] == plain.json("all_results.json")[name]


def test_metrics_do_not_depend_on_layout_and_batches(start):
    runs = [start("--num_train_epochs", "1", "--max_eval_samples", "77", "--per_device_eval_batch_size", size, "--output_dir", f"out{size}") for size in ("7", "77")]
    assert [run.wait().status for run in runs] == [0, 0]
    small, large = (run.json("all_results.json", f"out{size}") for run, size in zip(runs, ("7", "77")))
    assert {name: small[name] for name in LINES} == pytest.approx({name: large[name] for name in LINES}, rel=1e-5)


def test_second_run_finds_the_tokens_in_the_cache_and_logs_beside_the_first(start, tmp_path, tiny):
    shutil.copytree(tiny / "data", tmp_path / "fresh")  # not seen by any other test
    (tmp_path / "fresh" / "extra.md").write_text("another folder, another fingerprint")
    first = start("--dataset_name", "fresh", "--num_train_epochs", "1", "--output_dir", "one").wait()
    second = start("--dataset_name", "fresh", "--num_train_epochs", "1", "--output_dir", "two", "--learning_rate", "5e-4").wait()
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "Tokenizing" in first.err and "Tokenizing" not in second.err
    assert len(list((tmp_path / "logs_rdrop").iterdir())) == 2


def test_three_classes_from_csv_with_names(start, tmp_path):
    (tmp_path / "data").mkdir()
    for split, seed in (("train", 3), ("test", 4)):
        rows = [(row["text"].strip("."), ("bad", "good")[row["label"]]) for row in make_reviews(300, seed)]
        rows += [(re.sub("|".join(OPINION[0]), "fine", text, flags=re.I), "fair") for text, _ in rows[:150]]
        (tmp_path / "data" / f"{split}.csv").write_text("review,stars\n" + "\n".join(map(",".join, rows)))
    flags = ("--dataset_name", "data", "--text_column", "review", "--label_column", "stars")
    run = start(*flags, "--num_train_epochs", "6", "--early_stopping_patience", "0").wait()
    assert run.status == 0, run.err
    assert run.json("config.json")["id2label"] == {"0": "bad", "1": "fair", "2": "good"}
    # six epochs tell the tiny model what is fair, not yet good from bad
    assert run.json("all_results.json")["eval_f1"] > 0.5 and run.json("all_results.json")["eval_auc"] > 0.75
    (answer,) = pipeline("text-classification", model=str(tmp_path / "results_rdrop"))("The fine film was a fine story.")
    assert answer["label"] == "fair"


def test_plain_baseline_logs_no_kl(start, tmp_path):
    run = start("--rdrop_alpha", "0", "--num_train_epochs", "1", "--logging_steps", "5").wait()
    assert run.status == 0, run.err
    (folder,) = (tmp_path / "logs_rdrop").iterdir()
    logged = scalars(folder)
    assert "train/kl" not in logged and [v for _, v in logged["train/ce"]] == [v for _, v in logged["train/loss"]]


def test_group_by_length_and_accumulation_and_bf16_run(start):
    run = start("--train_sampling_strategy", "group_by_length", "--gradient_accumulation_steps", "2", "--bf16", "--num_train_epochs", "1").wait()
    assert run.status == 0, run.err


def test_unreachable_hub_ends_in_one_line(unreachable_hub):
    out, err = unreachable_hub.communicate()
    assert unreachable_hub.returncode == 2 and len(err.splitlines()) == 1, err
    assert all(word in err for word in ("stanfordnlp/imdb", "HF_ENDPOINT", "local folder", "http://127.0.0.1:9"))
