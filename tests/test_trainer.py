"""RDropTrainer and compute_metrics from the inside: passes counted, losses compared, logs recomputed."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainerCallback

from train_rdrop import RDropArguments, RDropLoss, RDropTrainer, compute_metrics


@pytest.fixture
def build(tiny, tmp_path):
    """`build(dropout, rows, alpha=..., **arguments)` makes a trainer of the tiny model; `.calls` counts its passes."""

    def build(dropout=0.1, rows=32, length=None, alpha=5.0, **arguments):
        model = AutoModelForSequenceClassification.from_pretrained(
            tiny / "model", hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
        )
        rng = np.random.default_rng(0)
        lengths = [length or int(n) for n in rng.integers(4, 60, rows)]
        data = Dataset.from_dict(
            {
                "input_ids": [[0, *rng.integers(5, 300, n - 2).tolist(), 2] for n in lengths],
                "attention_mask": [[1] * n for n in lengths],
                "length": lengths,
                "labels": (np.arange(rows) % 2).tolist(),
            }
        )
        defaults = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none", "save_strategy": "no"}
        defaults |= {"eval_strategy": "no", "load_best_model_at_end": False, "disable_tqdm": True}
        defaults |= {"learning_rate": 1e-3, "label_smoothing_factor": 0.1, "per_device_train_batch_size": 16}
        defaults |= {"per_device_eval_batch_size": 16}
        trainer = RDropTrainer(
            model=model,
            args=RDropArguments(**defaults | arguments),
            train_dataset=data,
            eval_dataset=data,
            data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(tiny / "model")),
            compute_metrics=compute_metrics,
            alpha=alpha,
        )
        trainer.calls = []
        model.register_forward_hook(lambda module, _, output: trainer.calls.append((module.training, output.logits)))
        return trainer

    return build


@pytest.mark.parametrize("alpha, passes", [(5.0, 2), (0.0, 1)])
def test_passes_of_training_and_evaluation(build, alpha, passes):
    trainer = build(alpha=alpha, max_steps=3, logging_steps=1)
    trainer.train()
    assert [training for training, _ in trainer.calls] == [True] * 3 * passes
    if passes == 2:
        pairs = zip(trainer.calls[::2], trainer.calls[1::2], strict=True)
        assert all(not torch.equal(a, b) for (_, a), (_, b) in pairs)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(("kl" in entry) == (alpha > 0) and "ce" in entry for entry in logs) and len(logs) == 3
    trainer.calls.clear()
    trainer.evaluate()
    assert [training for training, _ in trainer.calls] == [False] * 2  # 32 samples, 16 a batch


def test_operations_of_both_passes_are_counted(build):
    flos = {}
    for alpha in (0.0, 5.0):
        trainer = build(alpha=alpha, length=20, max_steps=2)
        trainer.train()
        flos[alpha] = trainer.state.total_flos
    assert flos[5.0] == 2 * flos[0.0] > 0


def test_evaluation_loss_is_that_of_two_passes(build):
    trainer = build(rows=21)
    loss = trainer.evaluate()["eval_loss"]
    logits = torch.cat([logits for _, logits in trainer.calls])
    labels = torch.tensor(trainer.eval_dataset["labels"][:])
    assert loss == pytest.approx(RDropLoss(5.0, 0.1)(logits, logits, labels).item(), rel=1e-6)


def test_plain_baseline_is_cross_entropy(build):
    trainer = build(alpha=0.0, max_steps=1, logging_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    wanted = torch.nn.functional.cross_entropy(outputs["logits"], batch["labels"], label_smoothing=0.1)
    assert loss.item() == wanted.item()


def test_gradient_accumulation_gives_the_loss_and_gradient_of_one_batch(build):
    logs = []
    for size, steps in ((16, 1), (4, 4)):
        trainer = build(
            dropout=0.0, rows=32, length=20, max_steps=2, logging_steps=1, max_grad_norm=1e9,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        grads = []

        class RecordGradients(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model, grads=grads, **kwargs):
                grads.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))

        trainer.add_callback(RecordGradients)
        trainer.train()
        logs.append((grads, [entry for entry in trainer.state.log_history if "loss" in entry]))
    (grads1, logs1), (grads4, logs4) = logs
    for one, four in zip(grads1, grads4, strict=True):
        assert torch.allclose(one, four, rtol=1e-3, atol=1e-6) and one.abs().max() > 1e-3
    for one, four in zip(logs1, logs4, strict=True):
        assert all(one[key] == pytest.approx(four[key], rel=1e-4) for key in ("loss", "ce", "grad_norm"))


def test_log_holds_the_means_since_the_last_log(build):
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    trainer = build(rows=40, num_train_epochs=2, logging_steps=2, **batches)
    parts = []

    def terms(*args, real=trainer.rdrop_loss.terms):
        parts.append([part.item() for part in real(*args)])
        return real(*args)

    trainer.rdrop_loss.terms = terms
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    # 10 batches an epoch: steps of 3, 3, 3 and 1 batches
    bounds = [0, 3, 6, 9, 10, 13, 16, 19, 20]
    steps = np.array([np.mean(parts[a:b], axis=0) for a, b in pairwise(bounds)])
    for entry, (ce, kl) in zip(logs, (steps[0::2] + steps[1::2]) / 2, strict=True):
        assert (entry["ce"], entry["kl"]) == (pytest.approx(ce, rel=1e-5), pytest.approx(kl, rel=1e-4))
        assert entry["loss"] == pytest.approx(ce + 5.0 * kl, rel=1e-5)


def test_a_step_reads_no_value_back_from_the_device(build, monkeypatch):
    trainer = build()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    real = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def model(**inputs):  # the library's own model may read what it likes
        return type("Output", (), {"logits": real})

    model.training = True
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_: pytest.fail("a value was read back"))
    trainer.compute_loss(model, batch)


def test_evaluation_keeps_the_order_of_its_data(build):
    trainer = build(rows=21)
    order = trainer.eval_dataset["length"][:]
    batches = [batch["attention_mask"].sum(1).tolist() for batch in trainer.get_eval_dataloader()]
    assert batches == [order[:16], order[16:]]


def test_metrics_of_two_classes():
    logits = np.array([[2, -1], [0.5, 1], [1, 0], [-3, 4], [0, 0.1]], dtype=np.float32)
    labels = np.array([0, 0, 1, 1, 1])
    metrics = compute_metrics((logits, labels))
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    # of the 6 pairs (negative, positive), those in which the positive one is ranked higher
    assert metrics["auc"] == pytest.approx(4 / 6)
    turned = compute_metrics((logits, labels), positive=0)
    assert turned["f1"] == pytest.approx(2 * 1 / (2 * 1 + 1 + 1)) and turned["auc"] == pytest.approx(4 / 6)
    assert turned["accuracy"] == metrics["accuracy"]


def test_metrics_of_more_classes():
    logits = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    labels = np.arange(30) % 3
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    metrics = compute_metrics((logits, labels))
    assert metrics["auc"] == pytest.approx(np.mean([roc_auc_score(labels == c, p[:, c]) for c in range(3)]))
    predicted = logits.argmax(axis=1)
    hits = [((predicted == c) & (labels == c)).sum() for c in range(3)]
    f1 = [2 * hits[c] / ((predicted == c).sum() + (labels == c).sum()) for c in range(3)]
    assert metrics["f1"] == pytest.approx(np.mean(f1))


def test_auc_is_left_out_where_it_is_undefined():
    metrics = compute_metrics((np.array([[2.0, -1], [0.5, 1]]), np.array([1, 1])))
    assert metrics.keys() == {"accuracy", "f1"}


def test_metrics_refuse_logits_that_are_not_finite():
    with pytest.raises(FloatingPointError):
        compute_metrics((np.array([[np.nan, 1.0], [0, 1]]), np.array([0, 1])))
