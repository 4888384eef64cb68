"""How fast train_rdrop.py is beside the published way, on the same model, data and seed, in one process.

    python tests/benchmark.py                                   # the tiny model and data of tiny_imdb.py
    python tests/benchmark.py --model_name_or_path FOLDER --random_weights --dataset_name FOLDER_OR_HUB_ID \\
        --max_train_samples 320 --max_eval_samples 320

It takes the script's own flags and those of `BenchmarkArguments`. Each repeat runs every variant once, in rotating
order: evaluate the initial weights, then train one epoch. Rates are medians over the repeats; ratios are medians of
each repeat's ratio to the published way, for a machine's speed drifts. Pytest does not collect this file.
"""

import ctypes
import gc
import math
import statistics
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from datasets import DatasetDict
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers import HfArgumentParser, Trainer, TrainerCallback, set_seed
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny_imdb

from train_rdrop import RDropArguments, RDropLoss, RDropTrainer, load_model, load_splits, tokenize

# Dense fp16/bf16 peak of a card in FLOP/s, as its maker's data sheet gives it.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12, "T4": 65e12}


@dataclass
class BenchmarkArguments(RDropArguments):
    """The script's arguments, with those of a benchmark that writes nothing."""

    model_name_or_path: str = HfArg(default="tiny", help="Hub id or folder, or the model of tiny_imdb.py.")
    dataset_name: str = HfArg(default="tiny", help="Hub id or folder, or the data of tiny_imdb.py.")
    repeats: int = HfArg(default=3, help="How often every variant runs.")
    random_weights: bool = HfArg(default=False, help="Make the model from its config: a step costs the same.")
    config_overrides: str | None = HfArg(default=None, help="With --random_weights, e.g. num_hidden_layers=4,hidden_size=128")
    doubled_batch: bool | None = HfArg(default=None, help="Also time one call on the doubled batch. Default: on CUDA.")
    num_train_epochs: float = HfArg(default=1.0, help="Epochs timed in each repeat.")
    report_to: list[str] = HfArg(default_factory=lambda: ["none"], help="Where curves go.")


class PublishedTrainer(Trainer):
    """The published way: two passes in training and in evaluation, labels passed to the model, library defaults."""

    def __init__(self, *args, alpha, label_smoothing, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.rdrop_loss = RDropLoss(alpha, label_smoothing)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first, second = model(**inputs), model(**inputs)
        loss = self.rdrop_loss(first.logits, second.logits, inputs["labels"])
        return (loss, first) if return_outputs else loss


class DoubledTrainer(RDropTrainer):
    """The paper's own trick: one call on the batch twice over, [x; x], instead of two calls."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        twice = {name: torch.cat([x, x]) for name, x in inputs.items() if name != "labels"}
        first, second = model(**twice).logits.chunk(2)
        return self.rdrop_loss(first, second, labels)


class Clock(TrainerCallback):
    """Times a training from the first step's begin to the last step's end."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            synchronize()
            self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            synchronize()
            self.seconds = time.perf_counter() - self.begin


class CountingCollator(DataCollatorWithPadding):
    """Counts the tokens of its batches, with and without padding."""

    def __call__(self, features):
        batch = super().__call__(features)
        self.computed = getattr(self, "computed", 0) + batch["attention_mask"].numel()
        self.real = getattr(self, "real", 0) + batch["attention_mask"].sum().item()
        return batch

    def take_share(self):
        share = 1 - self.real / self.computed
        self.computed = self.real = 0
        return share


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def peak_memory():
    """Yields a list that holds, at the end, the peak in MiB: allocated on the GPU, or what this process has grown by."""
    peak = []
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.append(torch.cuda.max_memory_allocated() / 2**20)
        return
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # (Linux) gives back what earlier variants have freed
    process, ended = psutil.Process(), threading.Event()
    start = process.memory_info().rss
    seen = [start]

    def watch():
        while not ended.wait(0.02):
            seen[0] = max(seen[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield peak
    ended.set()
    watcher.join()
    peak.append((seen[0] - start) / 2**20)


def build(variant, args, data, weights, tokenizer, model, pad_to_8):
    """A trainer of `variant`, the model at its initial weights."""
    changes = {"output_dir": tempfile.mkdtemp(), "eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    changes |= {"load_best_model_at_end": False, "logging_strategy": "steps"}
    if variant == "group_by_length":
        changes["train_sampling_strategy"] = "group_by_length"
    if variant == "published":  # Trainer's own defaults, which the script changes
        changes |= {"logging_nan_inf_filter": True}
    model.load_state_dict(weights)
    trainer_class = {"published": PublishedTrainer, "doubled batch": DoubledTrainer}.get(variant, RDropTrainer)
    multiple = 8 if pad_to_8 and variant != "published" else None
    return trainer_class(
        model=model,
        args=replace(args, **changes),
        train_dataset=data["train"],
        eval_dataset=data["published order" if variant == "published" else "test"],
        data_collator=CountingCollator(tokenizer, pad_to_multiple_of=multiple),
        callbacks=[Clock()],
        alpha=args.rdrop_alpha,
        label_smoothing=args.label_smoothing_factor,
    )


def measure(trainer):
    """Evaluate, then train; returns the figures of both."""
    figures = {}
    trainer.compute_metrics = lambda eval_pred: {}  # so that logits are gathered, as in a real evaluation
    synchronize()
    begin = time.perf_counter()
    with peak_memory() as peak:
        figures["eval loss"] = trainer.evaluate()["eval_loss"]
    synchronize()
    figures["eval samples/s"] = len(trainer.eval_dataset) / (time.perf_counter() - begin)
    figures["eval padding"], figures["eval MiB"] = trainer.data_collator.take_share(), peak[0]
    with peak_memory() as peak:
        trainer.train()
    clock = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Clock))
    figures["train samples/s"] = len(trainer.train_dataset) * trainer.args.num_train_epochs / clock.seconds
    figures["train padding"], figures["train MiB"] = trainer.data_collator.take_share(), peak[0]
    figures["train s/step"] = clock.seconds / trainer.state.global_step
    return figures


def profile(trainer):
    """The share of a training's time in forward, backward, optimizer (with clipping), and the rest, in that order."""
    spent = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}

    def timed(part, function):
        def call(*args, **kwargs):
            synchronize()
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize()
            spent[part] += time.perf_counter() - begin
            return result

        return call

    trainer.compute_loss = timed("forward", trainer.compute_loss)
    trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)
    trainer._clip_grad_norm = timed("optimizer", trainer._clip_grad_norm)

    class TimeOptimizer(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **kwargs):
            optimizer.step = timed("optimizer", optimizer.step)

    trainer.add_callback(TimeOptimizer)
    trainer.train()
    clock = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Clock))
    return {**{part: s / clock.seconds for part, s in spent.items()}, "outside": 1 - sum(spent.values()) / clock.seconds}


def flops_per_step(trainer):
    """FLOPs of matrix products and attention, forward and backward, that a mean step of this training computes."""
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    return counter.get_total_flops() / trainer.state.global_step


def main():
    parser = HfArgumentParser(BenchmarkArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    (args,) = parser.parse_args_into_dataclasses(look_for_args_file=False)
    made = Path(tempfile.mkdtemp())
    if args.model_name_or_path == "tiny":
        tiny_imdb.write_model(made / "model")
        args.model_name_or_path = str(made / "model")
    if args.dataset_name == "tiny":
        tiny_imdb.write_data(made / "data")
        args.dataset_name = str(made / "data")

    set_seed(args.seed)
    splits = load_splits(args)
    names = splits["train"].features["labels"].names
    if args.random_weights:
        config = AutoConfig.from_pretrained(args.model_name_or_path, num_labels=len(names))
        if args.config_overrides:
            config.update_from_string(args.config_overrides)
        AutoTokenizer.from_pretrained(args.model_name_or_path).save_pretrained(folder := tempfile.mkdtemp())
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        args.model_name_or_path = folder
    tokenizer, model, limit = load_model(args, names)
    max_length = min(args.max_length or limit, limit)
    data = tokenize(splits, tokenizer, args, max_length)
    # `tokenize` leaves the order of a train split as it is
    data["published order"] = tokenize(DatasetDict(train=splits["test"]), tokenizer, args, max_length)["train"]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pad_to_8 = args.fp16 or args.bf16

    variants = ["published", "default", "group_by_length"]
    if args.doubled_batch or (args.doubled_batch is None and torch.cuda.is_available()):
        variants.append("doubled batch")
    few = DatasetDict({split: rows.select(range(min(len(rows), 32))) for split, rows in data.items()})
    for variant in variants:  # first calls allocate, choose kernels, compile
        measure(build(variant, args, few, weights, tokenizer, model, pad_to_8))
    repeats = []
    for repeat in range(args.repeats):
        turn = repeat % len(variants)
        figures = {}
        for variant in variants[turn:] + variants[:turn]:
            figures[variant] = measure(build(variant, args, data, weights, tokenizer, model, pad_to_8))
            print(f"repeat {repeat + 1}, {variant}: {figures[variant]}", file=sys.stderr)
        losses = [figure["eval loss"] for figure in figures.values()]
        assert all(math.isclose(loss, losses[0], rel_tol=1e-3) for loss in losses), f"evaluation losses differ: {losses}"
        repeats.append(figures)

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    shape = f"{model.config.model_type}, {model.num_parameters() / 1e6:.1f} M parameters, {max_length} tokens"
    print(f"{device}; torch {torch.__version__}; {shape}; {args.mixed_precision}; batch {args.per_device_train_batch_size}")
    print(f"{len(data['train'])} train and {len(data['test'])} test samples, {args.repeats} repeats\n")
    columns = ("train samples/s", "train padding", "train MiB", "eval samples/s", "eval padding", "eval MiB", "eval loss")
    print(f"| variant | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for variant in variants:
        cells = []
        for column in columns:
            figure = statistics.median(figures[variant][column] for figures in repeats)
            ratios = [figures[variant][column] / figures["published"][column] for figures in repeats]
            if column.endswith("padding"):
                cells.append(f"{figure:.1%} ({statistics.median(ratios):.2f})")
            elif column == "eval loss":
                cells.append(f"{figure:.5f}")
            elif column.endswith("MiB"):
                cells.append(f"{figure:.0f} ({statistics.median(ratios):.2f})")
            else:
                cells.append(f"{figure:.1f} ({statistics.median(ratios):.2f}; {min(ratios):.2f}-{max(ratios):.2f})")
        print(f"| {variant} | {' | '.join(cells)} |")
    print("\nIn brackets: ratio to the published way, median (and range over the repeats).")

    shares = profile(build("default", args, data, weights, tokenizer, model, pad_to_8))
    print("Time of a default training:", ", ".join(f"{part} {share:.1%}" for part, share in shares.items()))
    if "doubled batch" in variants:
        peak = next((peak for card, peak in PEAK.items() if card in device), None)
        for variant in variants:
            seconds = statistics.median(figures[variant]["train s/step"] for figures in repeats)
            flops = flops_per_step(build(variant, args, data, weights, tokenizer, model, pad_to_8))
            share = f", {flops / seconds / peak:.1%} of the card's dense fp16 peak" if peak else ""
            print(f"{variant}: {seconds * 1e3:.1f} ms a step for {flops / 1e9:.2f} GFLOP, {flops / seconds / 1e12:.3f} TFLOP/s{share}")


if __name__ == "__main__":
    main()
