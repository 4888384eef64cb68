"""The script from start to end, as a user starts it, and what it leaves behind."""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib

import pytest
import torch
from conftest import ROOT, SCRIPT, Run, assert_same_end, scalars
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny_imdb import OPINION, make_reviews
from transformers import Trainer, pipeline

import train_rdrop

LINES = ("eval_loss", "eval_accuracy", "eval_f1", "eval_auc")
ODD = """it's "my" run"""  # a folder whose name a shell would take apart


@pytest.fixture(scope="module", autouse=True)
def unreachable_hub(tmp_path_factory):
    """The script without flags, at a Hub that does not answer: huggingface_hub tries for 23 s, so start it first."""
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, SCRIPT], cwd=tmp_path_factory.mktemp("unreachable"), env=env, **pipes
    ) as run:
        yield run
        run.kill()


@pytest.fixture(scope="module")
def short(tmp_path_factory, argv):
    """A short run into a folder whose name needs quotes, with its last line at work in a shell: (run, shell)."""
    flags = ("--validation_fraction", "0.1", "--max_train_samples", "64", "--num_train_epochs", "1")
    batches = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2")
    folder = ("--output_dir", ODD, "--positive_label", "neg")
    run = Run([*argv, *flags, *batches, *folder], tmp_path_factory.mktemp("short"), prelude="show_batches.py").wait()
    assert run.status == 0, run.err
    command = re.search("^Try it: +(.*)", run.out, re.M)[1]
    env = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, shell=True, cwd=run.folder, env=env, **pipes) as shell:
        yield run, shell
        shell.kill()


def hparams(folder):
    """What TensorBoard's HPARAMS tab shows of the run in `folder`."""
    events = EventAccumulator(str(folder)).Reload()
    data = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    values = data.session_start_info.hparams.items()
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values}


def test_smoke(tmp_path):
    """The README's run without a Hub, in processes of their own: it learns, and stops early."""
    subprocess.run([sys.executable, ROOT / "tests" / "tiny_imdb.py", "tiny"], cwd=tmp_path, check=True)
    flags = "--model_name_or_path tiny/model --dataset_name tiny/data --learning_rate 1e-3 --num_train_epochs 20"
    command = [sys.executable, SCRIPT, *flags.split(), "--logging_steps", "5"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

    results = tmp_path / "results_rdrop"
    for name in ("arguments", "all_results", "train_results", "eval_results", "trainer_state", "tokenizer"):
        assert (results / f"{name}.json").is_file(), name
    metrics = json.loads((results / "all_results.json").read_text())
    assert metrics["eval_f1"] > 0.9 and metrics["eval_auc"] > 0.9 and metrics["eval_accuracy"] > 0.9

    # three evaluations that do not beat the best by more than 0.01 end the run, long before the 20th epoch
    state = json.loads((results / "trainer_state.json").read_text())
    *evals, final = [entry for entry in state["log_history"] if "eval_f1" in entry]
    f1 = [entry["eval_f1"] for entry in evals]
    best = max(range(len(f1)), key=lambda i: f1[i])
    assert metrics["epoch"] == len(f1) < 20 and len(f1) >= 4
    assert max(f1[-3:]) <= max(f1[:-3]) + 0.01
    assert metrics["eval_f1"] == f1[best] and state["best_global_step"] == 25 * (best + 1)
    assert metrics["eval_loss"] == final["eval_loss"] == evals[best]["eval_loss"]  # the model card shows the last
    assert len(list(results.glob("checkpoint-*"))) == 2

    # what stdout says before and after
    lines = run.stdout.splitlines()
    assert lines[:2] == [
        "train: 400 of 400 rows, {'neg': 200, 'pos': 200}",
        "test: 100 of 100 rows, {'neg': 50, 'pos': 50}",
    ]
    assert re.fullmatch(r"F1 and AUC of pos; \d+ tokens to train on, at most 64 a text", lines[2])
    assert lines[3] == "effective batch 16, steps 0 to 500"
    said = ", ".join(f"{name} {metrics['eval_' + name]:.4f}" for name in ("accuracy", "f1", "auc"))
    assert f"Test split: {said} (F1 and AUC of pos)" in lines
    assert "Curves:     tensorboard --logdir ./logs_rdrop" in lines
    assert "Try it:     python -c 'from transformers import pipeline; " in run.stdout

    # curves, one folder a run
    (folder,) = (tmp_path / "logs_rdrop").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.\d{6}_results_rdrop", folder.name)
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
    texts = EventAccumulator(str(folder)).Reload()
    (shown,) = texts.Tensors("args/text_summary")[0].tensor_proto.string_val
    assert b'"rdrop_alpha": 5.0' in shown and b'"model_name_or_path": "tiny/model"' in shown

    # the settings and final figures by which TensorBoard compares runs
    paths = {"model": "tiny/model", "data": "tiny/data"}
    settings = {"alpha": 5, "smoothing": 0.1, "seed": 42, "learning_rate": 1e-3, "epochs": 20, "batch": 16}
    assert hparams(folder) == settings | paths
    for name in ("accuracy", "f1", "auc"):
        assert [value for _, value in logged[f"final/{name}"]] == [pytest.approx(metrics[f"eval_{name}"])], name

    classify = pipeline("text-classification", model=str(results))
    assert classify("A wonderful superb film.")[0]["label"] == "pos"
    assert classify("An awful boring film.")[0]["label"] == "neg"
    assert classify("dull " * 500, truncation=True)[0]["label"] == "neg"


def test_start_lines_say_what_will_happen(short):
    run, _ = short
    lines = run.out.splitlines()
    train = re.fullmatch(r"train: 64 of 400 rows, \{'neg': (\d+), 'pos': (\d+)\}", lines[0])
    assert sum(map(int, train.groups())) == 64
    assert lines[1] == "test: 100 of 100 rows, {'neg': 50, 'pos': 50}"
    assert lines[2] == "validation: 40 of 400 rows, {'neg': 20, 'pos': 20}"  # held out of train's 400
    (epoch,) = re.findall("^TRAIN (.*)", run.out, re.M)
    tokens = sum(len(ids) for ids, _, _ in json.loads(epoch))
    assert lines[3] == f"F1 and AUC of neg; {tokens} tokens to train on, at most 64 a text"
    assert "effective batch 8, steps 0 to 8" in lines


def test_summary_of_the_run_is_about_the_test_split(short):
    run, _ = short
    figures = run.json("all_results.json", ODD)
    (folder,) = (run.folder / "logs_rdrop").iterdir()
    assert re.fullmatch(f"[-_0-9.]+_{ODD}", folder.name)
    logged, names = scalars(folder), ("accuracy", "f1", "auc")
    for name in names:
        assert [value for _, value in logged[f"final/{name}"]] == [pytest.approx(figures[f"test_{name}"])], name
    assert {tag for tag in logged if tag.startswith("test/")} == set()
    assert hparams(folder)["batch"] == 8 and hparams(folder)["epochs"] == 1
    said = ", ".join(f"{name} {figures['test_' + name]:.4f}" for name in names)
    assert f"Test split: {said} (F1 and AUC of neg)" in run.out.splitlines()


def test_line_to_try_runs_in_a_shell(short):
    _, shell = short
    out, err = shell.communicate()
    assert shell.returncode == 0, err
    assert re.fullmatch(r"\[\{'label': '(neg|pos)', 'score': 0\.\d+\}\]", out.strip())


def test_same_seed_same_figures_to_the_last_digit(start):
    runs = [start("--num_train_epochs", "2", "--output_dir", f"out{i}", "--seed", seed) for i, seed in enumerate("112")]
    assert [run.wait().status for run in runs] == [0, 0, 0]
    first, second, other = (run.json("all_results.json", f"out{i}") for i, run in enumerate(runs))
    names = (*LINES, "train_loss")
    assert {name: first[name] for name in names} == {name: second[name] for name in names}
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
    flags = ("--num_train_epochs", "1", "--max_eval_samples", "77", "--per_device_eval_batch_size")
    runs = [start(*flags, size, "--output_dir", f"out{size}") for size in ("7", "77")]
    assert [run.wait().status for run in runs] == [0, 0]
    small, large = (runs[0].json("all_results.json", f"out{size}") for size in ("7", "77"))
    assert {name: small[name] for name in LINES} == pytest.approx({name: large[name] for name in LINES}, rel=1e-5)


def test_second_run_finds_the_tokens_in_the_cache_and_logs_beside_the_first(start, tmp_path, tiny):
    shutil.copytree(tiny / "data", tmp_path / "fresh")  # not seen by any other test
    (tmp_path / "fresh" / "extra.md").write_text("another folder, another fingerprint")
    flags = ("--dataset_name", "fresh", "--num_train_epochs", "1", "--output_dir")
    first = start(*flags, "one").wait()
    second = start(*flags, "two", "--learning_rate", "5e-4").wait()
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "Tokenizing" in first.err and "Tokenizing" not in second.err
    assert [folder.name[-4:] for folder in sorted((tmp_path / "logs_rdrop").iterdir())] == ["_one", "_two"]


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
    assert "train: 450 of 450 rows, {'bad': 150, 'fair': 150, 'good': 150}" in run.out.splitlines()
    assert "\nmacro F1 and AUC; " in run.out and "(macro F1 and AUC)" in run.out
    # six epochs tell the tiny model what is fair, not yet good from bad
    assert run.json("all_results.json")["eval_f1"] > 0.5 and run.json("all_results.json")["eval_auc"] > 0.75
    classify = pipeline("text-classification", model=str(tmp_path / "results_rdrop"))
    (answer,) = classify("The fine film was a fine story.")
    assert answer["label"] == "fair"


def test_fp16_skips_steps_that_overflow_learns_and_is_resumed_with_its_scaler(start, tmp_path):
    flags = ("--early_stopping_patience", "0", "--num_train_epochs", "4", "--save_total_limit", "9")
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
    run = start("--rdrop_alpha", "0", "--num_train_epochs", "1", "--logging_steps", "5").wait()
    assert run.status == 0, run.err
    (folder,) = (tmp_path / "logs_rdrop").iterdir()
    logged = scalars(folder)
    assert "train/kl" not in logged and [v for _, v in logged["train/ce"]] == [v for _, v in logged["train/loss"]]


def test_group_by_length_and_accumulation_and_bf16_run(start):
    flags = ("--train_sampling_strategy", "group_by_length", "--gradient_accumulation_steps", "2", "--bf16")
    run = start(*flags, "--num_train_epochs", "1").wait()
    assert run.status == 0, run.err


def test_unreachable_hub_ends_in_one_line(unreachable_hub):
    out, err = unreachable_hub.communicate()
    assert unreachable_hub.returncode == 2 and len(err.splitlines()) == 1, err
    assert all(word in err for word in ("stanfordnlp/imdb", "HF_ENDPOINT", "local folder", "http://127.0.0.1:9"))


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
    assert {name for name in functions if hasattr(Trainer, name)} == {"__init__", "compute_loss", "log", "save_model"}


def lines_for_another_script():
    """The first block of Python in the README's section on the loss in other scripts, as it stands there."""
    section = re.search(r"^## From another script\n(.*?)(?=^## |\Z)", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    fenced, indented = re.search(r"```python\n(.*?)```|((?:^(?: {4}.*)?\n)*^ {4}.*\n)", section, re.M | re.S).groups()
    return fenced or textwrap.dedent(indented)
