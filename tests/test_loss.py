"""RDropLoss against the formula, written out anew in float64."""

import numpy as np
import pytest
import torch

from train_rdrop import RDropLoss

LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2])


def logits(seed, classes=3):
    return 3 * torch.randn(len(LABELS), classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(z1, z2, labels, alpha, smoothing):
    """CE, KL and loss, sample by sample and class by class, from the definition of each."""
    n, classes = z1.shape
    ce = kl = 0.0
    for a, b, y in zip(z1.tolist(), z2.tolist(), labels.tolist(), strict=True):
        p = np.exp(a) / np.exp(a).sum()
        q = np.exp(b) / np.exp(b).sum()
        target = [(1 - smoothing) * (c == y) + smoothing / classes for c in range(classes)]
        ce += sum(-t * np.log(pc) - t * np.log(qc) for t, pc, qc in zip(target, p, q, strict=True)) / 2
        kl += sum(qc * np.log(qc / pc) + pc * np.log(pc / qc) for pc, qc in zip(p, q, strict=True)) / 2
    return ce / n, kl / n, ce / n + alpha * kl / n


def values(loss, z1, z2):
    """CE, KL and loss, as `loss` gives them."""
    return [part.item() for part in (*loss.terms(z1, z2, LABELS), loss(z1, z2, LABELS))]


@pytest.mark.parametrize("alpha, smoothing", [(1.0, 0.0), (5.0, 0.1), (0.0, 0.3), (0.5, 0.9)])
@pytest.mark.parametrize("classes", [2, 3])
def test_loss_is_the_formula(alpha, smoothing, classes):
    z1, z2, labels = logits(1, classes), logits(2, classes), LABELS % classes
    loss = RDropLoss(alpha, smoothing)
    ce, kl, total = by_hand(z1, z2, labels, alpha, smoothing)
    assert [part.item() for part in loss.terms(z1, z2, labels)] == pytest.approx([ce, kl], rel=1e-5)
    assert loss(z1, z2, labels).item() == pytest.approx(total, rel=1e-5)
    assert loss.terms(z1, z1, labels)[0].item() == pytest.approx(by_hand(z1, z1, labels, 0, smoothing)[0], rel=1e-5)


def test_loss_is_a_scalar_that_can_be_minimized():
    z1, z2 = (logits(seed).requires_grad_() for seed in (1, 2))
    loss = RDropLoss(5.0, 0.1)
    loss(z1, z2, LABELS).backward()  # as of every torch loss
    assert z1.grad.abs().max() > 0.01 and z2.grad.abs().max() > 0.01
    # float32 inside: a step of 1e-2 keeps its rounding well below the tolerance
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, LABELS), (z1, z2), eps=1e-2, atol=1e-3, rtol=1e-3)


def test_symmetric_and_zero_where_passes_agree():
    z1, z2 = logits(1), logits(2)
    loss = RDropLoss(5.0, 0.1)
    assert values(loss, z1, z2) == pytest.approx(values(loss, z2, z1), rel=1e-6) and values(loss, z1, z2)[1] > 0.1
    ce = torch.nn.functional.cross_entropy(z1.float(), LABELS, label_smoothing=0.1).item()
    assert values(loss, z1, z1) == [ce, 0, ce]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float32_whatever_the_logits(dtype):
    z1, z2 = logits(1).to(dtype), logits(2).to(dtype)
    loss = RDropLoss(5.0, 0.1)
    parts = (*loss.terms(z1, z2, LABELS), loss(z1, z2, LABELS))
    assert all(part.dtype == torch.float32 and part.shape == () for part in parts)
    assert values(loss, z1, z2) == values(loss, z1.float(), z2.float())


def test_far_apart_passes_stay_finite():
    z1, z2 = torch.tensor([[6e4, -6e4]], dtype=torch.float16), torch.tensor([[-6e4, 6e4]], dtype=torch.float16)
    assert RDropLoss(5.0)(z1, z2, torch.tensor([0])).item() == pytest.approx(0.5 * 119936 + 5.0 * 119936, rel=1e-3)


@pytest.mark.parametrize(
    "name, value", [("alpha", -1), ("alpha", float("nan")), ("label_smoothing", 1.0), ("label_smoothing", -0.1)]
)
def test_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        RDropLoss(**{name: value})
