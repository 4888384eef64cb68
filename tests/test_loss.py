"""The loss beside the article's and the paper's formula, and the metrics beside scikit-learn, on made-up logits."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, classification_report, f1_score, roc_auc_score

from train_rdrop import RDropLoss, compute_metrics

LABELS = [0, 2, 1, 1, 0, 2, 2]


def logits(seed, classes=3, rows=7):
    return 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def softmax(row):
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def cross_entropy(rows, labels, smoothing):
    """Mean over the batch; `smoothing` is the share of the label that is spread over all classes."""
    total = 0.0
    for row, label in zip(rows, labels, strict=True):
        p = softmax(row)
        for c in range(len(row)):
            target = (1 - smoothing) * (c == label) + smoothing / len(row)
            total -= target * math.log(p[c])
    return total / len(rows)


def kl(rows1, rows2):
    """KL(p1 || p2): summed over the classes, averaged over the batch."""
    total = 0.0
    for row1, row2 in zip(rows1, rows2, strict=True):
        total += sum(a * math.log(a / b) for a, b in zip(softmax(row1), softmax(row2), strict=True))
    return total / len(rows1)


@pytest.mark.parametrize("alpha, smoothing, classes", [(1.0, 0.0, 2), (5.0, 0.1, 2), (0.0, 0.3, 3), (0.5, 0.9, 3)])
def test_loss_is_that_of_the_article(alpha, smoothing, classes):
    z1, z2, labels = logits(1, classes), logits(2, classes), [label % classes for label in LABELS]
    a, b = z1.tolist(), z2.tolist()
    ce = 1 / 2 * (cross_entropy(a, labels, smoothing) + cross_entropy(b, labels, smoothing))
    divergence = 1 / 2 * (kl(b, a) + kl(a, b))
    loss = RDropLoss(alpha, smoothing)
    assert loss(z1, z2, torch.tensor(labels)).item() == pytest.approx(ce + alpha * divergence, rel=1e-5)
    assert [term.item() for term in loss.terms(z1, z2, torch.tensor(labels))] == pytest.approx(
        [ce, divergence], rel=1e-5
    )


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_paper_loss_with_twice_the_alpha_is_twice_ours(alpha):
    z1, z2 = logits(1), logits(2)
    a, b, weight = z1.tolist(), z2.tolist(), 2 * alpha
    paper = cross_entropy(a, LABELS, 0) + cross_entropy(b, LABELS, 0) + weight / 2 * (kl(a, b) + kl(b, a))
    assert 2 * RDropLoss(alpha)(z1, z2, torch.tensor(LABELS)).item() == pytest.approx(paper, rel=1e-5)


def test_gradients_reach_both_passes():
    z1, z2 = (logits(seed).double().requires_grad_() for seed in (1, 2))
    loss, labels = RDropLoss(5.0, 0.1), torch.tensor(LABELS)
    # the loss computes in float32: large steps keep its rounding well below the tolerance
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, labels), (z1, z2), eps=1e-2, atol=1e-3, rtol=1e-3)


def test_equal_passes_have_no_kl():
    ce, divergence = RDropLoss(5.0, 0.1).terms(logits(1), logits(1), torch.tensor(LABELS))
    assert divergence == 0 and ce.item() == pytest.approx(cross_entropy(logits(1).tolist(), LABELS, 0.1), rel=1e-5)


def test_loss_is_float32_and_finite_for_logits_of_any_type():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        # the second pass is wrong by 1.2e5 nats: half of that in the CE, all of it in each KL
        z1, z2 = (torch.tensor([[size, -size]], dtype=dtype) for size in (6e4, -6e4))
        loss = RDropLoss(5.0)(z1, z2, torch.tensor([0]))
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0.5 * 1.2e5 + 5 * 1.2e5, rel=1e-2)


def test_values_out_of_range_are_refused():
    for alpha, smoothing in ((-1, 0), (math.nan, 0), (math.inf, 0), (1, 1.0), (1, -0.1)):
        with pytest.raises(ValueError):
            RDropLoss(alpha, smoothing)


@pytest.mark.parametrize("positive", [0, 1])
def test_metrics_of_two_classes(positive):
    z, labels = logits(3, 2, 50).numpy(), np.arange(50) % 3 % 2
    predicted, p = z.argmax(1), torch.from_numpy(z).double().softmax(1).numpy()
    metrics = compute_metrics((z, labels), positive, label_smoothing=0.2)
    smoothed = np.where(labels[:, None] == [0, 1], 0.9, 0.1)
    assert metrics == {
        "accuracy": accuracy_score(labels, predicted),
        "f1": pytest.approx(f1_score(labels, predicted, pos_label=positive)),
        "auc": pytest.approx(roc_auc_score(labels == positive, p[:, positive])),
        "loss": pytest.approx(-(smoothed * np.log(p)).sum(1).mean()),
    }


def test_metrics_of_more_classes():
    z, labels = logits(4, 4, 60).numpy(), np.arange(60) % 4
    p = torch.from_numpy(z).double().softmax(1).numpy()
    metrics = compute_metrics((z, labels))
    assert metrics["f1"] == pytest.approx(f1_score(labels, z.argmax(1), average="macro"))
    assert metrics["auc"] == pytest.approx(np.mean([roc_auc_score(labels == c, p[:, c]) for c in range(4)]))


def test_absent_class_leaves_auc_out_and_does_not_count_in_macro_f1():
    z, labels = logits(5, 4, 60).numpy(), np.arange(60) % 3
    assert 3 in z.argmax(1), "it is predicted, but has no label"
    metrics = compute_metrics((z, labels))
    report = classification_report(labels, z.argmax(1), labels=[0, 1, 2], output_dict=True)
    assert metrics.keys() == {"accuracy", "f1", "loss"}
    assert metrics["f1"] == pytest.approx(report["macro avg"]["f1-score"])
    assert compute_metrics((z[:, :2], np.ones(60, int))).keys() == {"accuracy", "f1", "loss"}
