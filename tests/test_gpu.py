"""On CUDA, in half precision: it learns, its figures are those of a CPU, buckets change nothing, and it resumes.

All runs are plain `python`, so several GPUs share each batch by DataParallel. Skipped without a GPU.
"""

import math
import shutil

import pytest
import torch
from conftest import LAST, predictions, read_json, train, weights
from datasets import load_dataset
from tiny_imdb import make_reviews
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from train_rdrop import RDropArguments, RDropTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PRECISIONS = {"fp16": [], "bf16": ["--bf16"]}  # fp16 is the default
# of the tiny model, whose logits are of size 1: half precision keeps 11 bits (fp16) or 8 bits (bf16) of a number
TOLERANCE = {"fp16": 5e-3, "bf16": 4e-2}


def on_all_gpus(argv):
    """The arguments of a short run on all GPUs, with an effective batch near 16."""
    batch = max(1, 16 // max(1, torch.cuda.device_count()))
    return [*(flag for flag in argv if flag != "--use_cpu"), "--per_device_train_batch_size", batch]


@pytest.fixture(scope="module", params=PRECISIONS)
def run(request, tmp_path_factory, argv):
    """A run that learns, and its precision: (folder, precision)."""
    folder = tmp_path_factory.mktemp(request.param)
    train(folder, *on_all_gpus(argv), *PRECISIONS[request.param], "--logging_steps", "10", "--num_train_epochs", "6")
    return folder, request.param


def test_loss_falls_and_kl_is_above_zero(run):
    folder, _ = run
    history = read_json(folder, "results", "trainer_state.json")["log_history"]
    logs = [entry for entry in history if "loss" in entry]
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"] and all(entry["kl"] > 0 for entry in logs)
    assert all(entry["loss"] == pytest.approx(entry["ce"] + 5.0 * entry["kl"], rel=1e-2) for entry in logs)
    assert read_json(folder, "results", "all_results.json")["eval_f1"] > 0.9


def test_precision_is_the_one_asked_for_and_weights_stay_float32(run):
    folder, precision = run
    arguments = read_json(folder, "results", "arguments.json")
    assert (arguments["fp16"], arguments["bf16"]) == (precision == "fp16", precision == "bf16")
    assert {weight.dtype for weight in weights(folder / "results").values()} == {torch.float32}


def test_scale_of_the_gradients_is_sane(run):
    """It begins at 2**16, is halved by each overflow, and doubled after 2,000 steps without one."""
    folder, precision = run
    files = sorted((folder / "results").glob("checkpoint-*/scaler.pt"))
    assert bool(files) == (precision == "fp16")
    for file in files:
        scale = torch.load(file, weights_only=True)["scale"]
        assert 2.0**4 <= scale <= 2.0**20 and math.log2(scale).is_integer()


def test_figures_are_those_of_a_cpu(run, tiny):
    folder, precision = run
    rows = predictions(folder / "results")
    texts = load_dataset("parquet", data_files=str(tiny / "data" / "test.parquet"), split="train")["text"][:]
    tokenizer = AutoTokenizer.from_pretrained(folder / "results")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "results").eval()
    batch = tokenizer([texts[int(row["row"])] for row in rows], truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    seen = torch.tensor([float(row["p_pos"]) for row in rows])
    assert (logits.softmax(-1)[:, 1] - seen).abs().max() < TOLERANCE[precision]
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).item()
    figures = read_json(folder, "results", "eval_results.json")
    assert figures["eval_loss"] == pytest.approx(loss, abs=TOLERANCE[precision])
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    assert figures["eval_accuracy"] == pytest.approx(accuracy, abs=0.02), "two of 100 rows may be close calls"


def loss_and_gradients(tiny, folder, precision, buckets):
    """Those of one batch of 64 reviews, by a model without dropout."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = AutoModelForSequenceClassification.from_pretrained(tiny / "model", **no_dropout)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    rows = make_reviews(64, seed=3).map(lambda row: tokenizer(row["text"], truncation=True))
    options = {"fp16": precision == "fp16", "bf16": precision == "bf16", "report_to": "none", "eval_strategy": "no"}
    options |= {"save_strategy": "no", "load_best_model_at_end": False}
    trainer = RDropTrainer(
        model=model,
        args=RDropArguments(output_dir=str(folder), **options),
        data_collator=DataCollatorWithPadding(tokenizer),
        alpha=5.0,
        length_buckets=buckets,
    )
    # as `Trainer` does it: with several GPUs there is no autocast
    wrapped = torch.nn.DataParallel(model) if trainer.args.n_gpu > 1 else trainer.accelerator.prepare(model)
    columns = [*tokenizer.model_input_names, "label"]
    batch = trainer.data_collator([{name: row[name] for name in columns} for row in rows])
    loss = trainer.compute_loss(
        wrapped.train(), {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
    )
    (2.0**10 * loss).backward()  # keeps small gradients in the range of fp16
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double().cpu()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_buckets_give_loss_and_gradients_of_the_whole_batch(tiny, tmp_path, precision):
    loss, wanted = loss_and_gradients(tiny, tmp_path, precision, 1)
    other_loss, other = loss_and_gradients(tiny, tmp_path, precision, 4)
    assert other_loss == pytest.approx(loss, rel=TOLERANCE[precision])
    assert (other - wanted).norm() < 5 * TOLERANCE[precision] * wanted.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_resumed_run_ends_as_the_whole_one(tmp_path, argv, precision):
    """Kernels of CUDA may add in another order each time, so weights may differ by some of AdamW's steps of 1e-3."""
    flags = [*on_all_gpus(argv), *PRECISIONS[precision], "--num_train_epochs", "2", "--early_stopping_patience", "0"]
    flags += ["--max_train_samples", "64", "--load_best_model_at_end", "false", "--save_total_limit", "9"]
    whole = train(tmp_path, *flags)
    shutil.copytree(tmp_path / "results", tmp_path / "cut")
    last = max((tmp_path / "cut").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    resumed = train(tmp_path, *flags, *LAST, "--output_dir", tmp_path / "cut")
    assert resumed["epoch"] == whole["epoch"] == 2
    assert resumed["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-2)
    one, two = weights(tmp_path / "results"), weights(tmp_path / "cut")
    difference = torch.cat([(one[name] - two[name]).flatten() for name in one]).abs()
    assert difference.mean() < 1e-4 and difference.max() < 1e-2
