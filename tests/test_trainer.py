"""RDropTrainer from the inside: passes, gradients and logs, which accumulation and length buckets must not change."""

from itertools import pairwise

import numpy as np
import pytest
import tiny_imdb
import torch
import transformers
from conftest import FEW, read_json, train, weights
from datasets import Dataset
from transformers import DataCollatorWithPadding, TrainerCallback

from train_rdrop import OwnArguments, RDropArguments, RDropLoss, RDropTrainer, load_model, split_by_length

LENGTHS = [5, 40, 17, 9, 33, 12, 5, 28, 50, 7, 21, 14, 62, 11, 26, 8]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SHAPE |= {"vocab_size": 300, "max_position_embeddings": 66, "pad_token_id": 1, "num_labels": 3}


class RecordGradients(TrainerCallback):
    """Keep the gradients of each step as the optimizer gets them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append(gradients(model))


def gradients(model):
    return torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()])


@pytest.fixture
def build(tmp_path):
    """`build(...)` makes a trainer on `rows` texts; its `passes` list (training?, shape of input, logits) per call."""

    def build(kind="Roberta", buckets=1, rows=16, dropout=0.0, alpha=5.0, padding_side="right", **arguments):
        rng = np.random.default_rng(0)
        lengths = (LENGTHS * 4)[:rows]
        columns = {"input_ids": [[0, *rng.integers(5, 300, n - 2).tolist(), 2] for n in lengths]}
        columns |= {"attention_mask": [[1] * n for n in lengths], "labels": [row % 3 for row in range(rows)]}
        if kind == "Bert":  # its token types tell both texts of a pair apart
            columns["token_type_ids"] = [[0] * (n // 3) + [1] * (n - n // 3) for n in lengths]
        torch.manual_seed(0)
        dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        config = getattr(transformers, f"{kind}Config")(**SHAPE, **dropouts)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
        tokenizer = tiny_imdb.make_tokenizer()
        tokenizer.padding_side = padding_side
        defaults = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "save_strategy": "no"}
        defaults |= {"eval_strategy": "no", "load_best_model_at_end": False, "disable_tqdm": True}
        trainer = RDropTrainer(
            model=model,
            args=RDropArguments(**defaults | arguments),
            train_dataset=Dataset.from_dict(columns),
            eval_dataset=Dataset.from_dict(columns),
            data_collator=DataCollatorWithPadding(tokenizer),
            alpha=alpha,
            length_buckets=buckets,
        )
        trainer.passes, trainer.gradients = [], RecordGradients()
        trainer.add_callback(trainer.gradients)

        def record(module, args, kwargs, output):
            trainer.passes.append((module.training, tuple(kwargs["input_ids"].shape), output.logits))

        model.register_forward_hook(record, with_kwargs=True)
        return trainer

    return build


def logs(trainer):
    """What it logged beside each training loss."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def loss_and_gradients(trainer):
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model.double().train(), batch)
    loss.backward()
    return loss.item(), gradients(trainer.model)


# ---- passes
@pytest.mark.parametrize("alpha, passes", [(5.0, 2), (0.0, 1)])
def test_passes_of_training_and_evaluation(build, alpha, passes):
    trainer = build(alpha=alpha, dropout=0.1, rows=32, max_steps=3, logging_steps=1)
    trainer.train()
    assert [training for training, _, _ in trainer.passes] == [True] * 3 * passes
    if passes == 2:  # with other dropout masks
        assert all(not a[2].equal(b[2]) for a, b in zip(trainer.passes[::2], trainer.passes[1::2], strict=True))
    assert (
        all((entry["kl"] > 0) == (alpha > 0) and entry["ce"] > 0 for entry in logs(trainer)) and len(logs(trainer)) == 3
    )
    trainer.passes.clear()
    loss = trainer.evaluate()["eval_loss"]
    assert [training for training, _, _ in trainer.passes] == [False] * 2  # batches of 16
    z, labels = torch.cat([logits for _, _, logits in trainer.passes]), torch.tensor(trainer.eval_dataset["labels"][:])
    assert loss == pytest.approx(RDropLoss(alpha, 0.1)(z, z, labels).item(), rel=1e-5)


def test_loss_and_logits_are_those_of_two_plain_passes(build):
    trainer = build(dropout=0.1)
    (batch,) = trainer.get_train_dataloader()
    trainer.model.train()
    torch.manual_seed(7)
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    torch.manual_seed(7)
    labels = batch.pop("labels")
    first, second = trainer.model(**batch).logits, trainer.model(**batch).logits
    assert outputs["logits"].equal(first) and loss.equal(RDropLoss(5.0, 0.1)(first, second, labels))


# ---- accumulation and logs
@pytest.mark.parametrize("rows", [32, 40])  # of 40, the last step of the epoch has 8
def test_accumulated_batches_give_the_gradients_of_one_batch(build, rows):
    runs = []
    for size, steps in ((16, 1), (4, 4)):
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = build(rows=rows, num_train_epochs=2, logging_steps=1, max_grad_norm=1e9, **batches)
        trainer.train()
        runs.append((trainer.gradients.steps, logs(trainer)))
    (whole, whole_logs), (parts, parts_logs) = runs
    assert len(whole) == len(parts) == 2 * -(-rows // 16)
    for one, four in zip(whole, parts, strict=True):
        assert torch.allclose(one, four, rtol=1e-3, atol=1e-6) and one.abs().max() > 1e-3
    for one, four in zip(whole_logs, parts_logs, strict=True):
        assert all(one[name] == pytest.approx(four[name], rel=1e-4) for name in ("loss", "ce", "grad_norm"))


def test_logs_are_means_over_the_steps_since_the_last(build):
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    trainer, terms = build(rows=40, dropout=0.1, num_train_epochs=2, logging_steps=2, **batches), []

    def record(*args, real=trainer.rdrop_loss.terms):
        terms.append([term.item() for term in real(*args)])
        return real(*args)

    trainer.rdrop_loss.terms = record
    trainer.train()
    bounds = [0, 3, 6, 9, 10, 13, 16, 19, 20]  # 10 batches an epoch: steps of 3, 3, 3 and 1 of them
    steps = np.array([np.mean(terms[a:b], axis=0) for a, b in pairwise(bounds)])
    for entry, (ce, kl) in zip(logs(trainer), (steps[0::2] + steps[1::2]) / 2, strict=True):
        assert entry["ce"] == pytest.approx(ce, rel=1e-5) and entry["kl"] == pytest.approx(kl, rel=1e-4)
        assert entry["loss"] == pytest.approx(ce + 5.0 * kl, rel=1e-5)
    assert not trainer.sums.requires_grad, "the sums for the log must not keep the graphs of past steps"


def test_ce_and_kl_are_logged_beside_the_loss_only(finished):
    history = read_json(finished, "trainer_state.json")["log_history"]
    assert all(("kl" in entry) == ("ce" in entry) == ("loss" in entry) for entry in history)
    assert ["kl" in entry for entry in history].count(True) == 4 and len(history) == 8


@pytest.mark.parametrize("logging_steps", [1, 50])
def test_loss_that_is_not_finite_ends_the_training(build, logging_steps):
    trainer = build(rows=32, max_steps=4, logging_steps=logging_steps, learning_rate=1e32, max_grad_norm=0.0)
    with pytest.raises(FloatingPointError):
        trainer.train()


# ---- buckets
@pytest.mark.parametrize("kind, rows, side", [("Roberta", 16, "right"), ("Roberta", 16, "left"), ("Bert", 3, "right")])
def test_buckets_give_loss_and_gradients_of_the_whole_batch(build, monkeypatch, kind, rows, side):
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # keeps the loss in float64
    loss, wanted = loss_and_gradients(build(kind, rows=rows, padding_side=side))
    for buckets in (2, 4, 16):
        other_loss, other = loss_and_gradients(build(kind, buckets, rows, padding_side=side))
        assert other_loss == pytest.approx(loss, abs=1e-10)
        assert other.dtype == torch.float64 and (other - wanted).abs().max() < 1e-10 < 1e-3 < wanted.abs().max()


WIDTHS = {  # rows and width of each part of a batch of LENGTHS
    1: [(16, 62)],
    2: [(8, 14), (8, 62)],
    4: [(4, 8), (4, 14), (4, 28), (4, 62)],
    5: [(4, 8), (4, 14), (4, 28), (4, 62)],  # parts of equal size, of which there may be fewer
    16: [(1, length) for length in sorted(LENGTHS)],
}


def test_parts_are_cut_to_their_longest_text_in_training_only(build):
    for buckets, shapes in WIDTHS.items():
        trainer = build(buckets=buckets)
        (batch,) = trainer.get_train_dataloader()
        trainer.compute_loss(trainer.model.train(), batch)
        assert [shape for _, shape, _ in trainer.passes] == 2 * shapes
        trainer.passes.clear()
        trainer.evaluate()
        assert [shape for _, shape, _ in trainer.passes] == [(16, 62)]


def test_parts_keep_every_token_and_can_be_put_back_in_order():
    lengths = torch.tensor([16, 3, 5, 1])
    right = (torch.arange(16) < lengths[:, None]).long()  # padded on the right
    for mask in (right, right.flip(-1)):
        inputs = {"attention_mask": mask, "input_ids": mask * torch.arange(1, 17)}
        for multiple_of in (1, 8):
            groups, order = split_by_length(inputs, 2, multiple_of)
            width = [group["input_ids"].shape[1] for group in groups]
            assert all(w % multiple_of == 0 for w in width)
            padded = [
                torch.nn.functional.pad(group["input_ids"], (0, 16 - w)) for group, w in zip(groups, width, strict=True)
            ]
            assert torch.cat(padded)[order].equal(inputs["input_ids"])


# ---- model
def test_half_precision_checkpoint_is_trained_in_float32_and_the_maximum_length_is_saved(tmp_path, argv, tiny):
    transformers.AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "half")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny / "model")
    model.half().save_pretrained(tmp_path / "half")
    flags = ["--model_name_or_path", tmp_path / "half", "--max_length", "10", "--max_steps", "1"]
    train(tmp_path, *argv, *FEW, *flags)
    assert {weight.dtype for weight in weights(tmp_path / "half").values()} == {torch.float16}
    assert {weight.dtype for weight in weights(tmp_path / "results").values()} == {torch.float32}
    assert read_json(tmp_path, "results", "tokenizer_config.json")["model_max_length"] == 10


def test_head_for_other_classes_is_replaced_and_dropout_can_be_set(tmp_path):
    tiny_imdb.write_model(tmp_path / "model", num_labels=5, problem_type="multi_label_classification")
    args = OwnArguments(model_name_or_path=str(tmp_path / "model"), config_overrides="hidden_dropout_prob=0.25")
    model = load_model(args, ["bad", "good"])
    assert model.config.id2label == {0: "bad", 1: "good"} and model.config.label2id == {"bad": 0, "good": 1}
    assert model.classifier.out_proj.weight.shape == (2, 32) and model.config.hidden_dropout_prob == 0.25
    assert model.config.problem_type == "single_label_classification"
