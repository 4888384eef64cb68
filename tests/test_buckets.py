"""--length_buckets: the same loss and gradients as of whole batches, from fewer tokens."""

import json
import re

import numpy as np
import pytest
import tiny_imdb
import torch
import transformers
from datasets import Dataset
from transformers import DataCollatorWithPadding, TrainerCallback

from train_rdrop import RDropArguments, RDropLoss, RDropTrainer, split_by_length

LENGTHS = [5, 40, 17, 9, 33, 12, 5, 28, 50, 7, 21, 14, 62, 11, 26, 8]
WIDTHS = {  # a batch of these lengths: rows and tokens of a row of each part
    1: [(16, 62)],
    2: [(8, 14), (8, 62)],
    4: [(4, 8), (4, 14), (4, 28), (4, 62)],
    16: [(1, length) for length in sorted(LENGTHS)],
    5: [(4, 8), (4, 14), (4, 28), (4, 62)],  # parts of equal size, of which there may be fewer
}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SHAPE |= {"vocab_size": 300, "max_position_embeddings": 66, "pad_token_id": 1}


class RecordGradients(TrainerCallback):
    """Keep the gradients of each step, as the optimizer gets them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append([parameter.grad.clone() for parameter in model.parameters()])


@pytest.fixture
def build(tmp_path):
    """`build(kind, buckets, rows, dropout)` makes a trainer of texts, or pairs, of LENGTHS; `.passes`: their shapes."""

    def build(kind="Roberta", buckets=1, rows=16, dropout=0.0, **arguments):
        rng = np.random.default_rng(0)
        lengths = (LENGTHS * 2)[:rows]
        columns = {"input_ids": [[0, *rng.integers(5, 300, n - 2).tolist(), 2] for n in lengths]}
        columns |= {"attention_mask": [[1] * n for n in lengths], "labels": [row % 3 for row in range(rows)]}
        if kind == "Bert":  # which tells both texts of a pair apart
            columns["token_type_ids"] = [[0] * (n // 3) + [1] * (n - n // 3) for n in lengths]
        torch.manual_seed(0)
        dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "num_labels": 3}
        config = getattr(transformers, f"{kind}Config")(**SHAPE, **dropouts)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
        arguments = {"per_device_train_batch_size": 16, "label_smoothing_factor": 0.1, **arguments}
        arguments |= {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "save_strategy": "no"}
        tokenizer = tiny_imdb.make_tokenizer()
        trainer = RDropTrainer(
            model=model,
            args=RDropArguments(**arguments, disable_tqdm=True),
            train_dataset=Dataset.from_dict(columns),
            eval_dataset=Dataset.from_dict(columns),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            alpha=5.0,
            length_buckets=buckets,
        )
        trainer.passes = []
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, inputs, _: trainer.passes.append(tuple(inputs[0].shape)))
        return trainer

    return build


@pytest.fixture
def float64(monkeypatch):
    """The loss computes as its logits are, not in float32."""
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)


def loss_and_gradients(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.double().train(), batch)
    loss.backward()
    return loss, [parameter.grad for parameter in trainer.model.parameters()]


def assert_close(gradients, wanted):
    assert max(gradient.abs().max() for gradient in wanted) > 1e-3
    for gradient, other in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.float64 and (gradient - other).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["Roberta", "Bert"])
@pytest.mark.parametrize("rows", [16, 3])
def test_loss_and_gradients_are_those_of_the_whole_batch(build, float64, kind, rows):
    loss, gradients = loss_and_gradients(build(kind, rows=rows))
    for buckets in (2, 4, 16):
        other_loss, other_gradients = loss_and_gradients(build(kind, buckets, rows))
        assert loss.dtype == torch.float64 and abs(loss - other_loss) < 1e-10
        assert_close(other_gradients, gradients)


def test_gradients_of_accumulated_batches(build, float64):
    recorded = []
    for buckets in (1, 4):
        accumulation = {"per_device_train_batch_size": 7, "gradient_accumulation_steps": 3, "max_steps": 2}
        trainer = build("Roberta", buckets, rows=30, **accumulation, logging_steps=1)
        trainer.model.double()
        gradients = RecordGradients()
        trainer.add_callback(gradients)
        trainer.train()
        recorded.append((gradients.steps, [entry for entry in trainer.state.log_history if "kl" in entry]))
    (steps, logs), (other_steps, other_logs) = recorded
    assert len(steps) == len(logs) == 2
    for gradients, others in zip(steps, other_steps, strict=True):
        assert_close(others, gradients)
    for entry, other in zip(logs, other_logs, strict=True):
        assert all(entry[name] == pytest.approx(other[name], rel=1e-6) for name in ("loss", "ce", "grad_norm"))


@pytest.mark.parametrize("buckets", WIDTHS)
def test_parts_are_cut_to_their_longest_text(build, buckets):
    trainer = build(buckets=buckets)
    (batch,) = trainer.get_train_dataloader()
    trainer.compute_loss(trainer.model.train(), batch)
    assert trainer.passes == 2 * WIDTHS[buckets]


def test_fewer_tokens_are_computed():
    tokens = {buckets: sum(rows * width for rows, width in parts) for buckets, parts in WIDTHS.items()}
    assert tokens == {1: 992, 2: 608, 4: 448, 16: 348, 5: 448}


def test_batches_that_a_collator_pads_on_the_left_lose_no_token():
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    parts, back = split_by_length({"attention_mask": mask, "input_ids": mask * torch.arange(1, 5)}, 2)
    assert torch.cat([part["input_ids"] for part in parts])[back].equal(mask * torch.arange(1, 5))


def test_evaluation_runs_whole_batches(build):
    trainer = build(buckets=4, rows=20, per_device_eval_batch_size=16)
    trainer.evaluate()
    assert trainer.passes == [(16, 62), (4, 40)]


def test_one_bucket_is_two_plain_passes_bit_for_bit(build):
    trainer = build(buckets=1, dropout=0.1)
    (batch,) = trainer.get_train_dataloader()
    trainer.model.train()
    torch.manual_seed(7)
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.manual_seed(7)
    labels = batch.pop("labels")
    first, second = trainer.model(**batch).logits, trainer.model(**batch).logits
    assert outputs["logits"].equal(first) and not first.equal(second)
    assert loss.equal(RDropLoss(5.0, 0.1)(first, second, labels))


def test_fewer_than_one_bucket_is_refused():
    with pytest.raises(ValueError, match="--length_buckets must be more than 0"):
        RDropArguments(length_buckets=0, report_to="none", eval_strategy="no")


def test_tokenizer_that_pads_on_the_left_is_refused(start, tmp_path):
    tiny_imdb.write_model(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left"}))
    run = start("--model_name_or_path", "model", "--length_buckets", "2").wait()
    run.assert_one_line(2, "--length_buckets", "pads on the right")
    assert not list(tmp_path.rglob("arguments.json"))


def test_half_precision_and_loss_scaling(start):
    flags = ("--length_buckets", "4", "--max_train_samples", "48", "--num_train_epochs", "1", "--logging_steps", "1")
    run = start(*flags, env={"ACCELERATE_MIXED_PRECISION": "fp16"}, prelude="fp16_on_cpu.py").wait()
    assert run.status == 0, run.err
    assert set(re.findall("^(?:LOGITS|LOSS) .*", run.out, re.M)) == {"LOGITS torch.float16", "LOSS torch.float32"}
    scales = [float(scale) for scale in re.findall("^SCALE (.*)", run.out, re.M)]
    assert len(scales) == 4 and scales[1] == scales[0] / 2, "the first step has overflowed"
