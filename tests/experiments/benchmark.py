"""How fast train_rdrop.py is beside the published way, on the same model, data and seed, in one process.

    python tests/experiments/benchmark.py            # the tiny model and data of tiny_imdb.py
    python tests/experiments/benchmark.py --model_name_or_path FOLDER --random_weights \\
        --dataset_name FOLDER_OR_HUB_ID --max_train_samples 320 --max_eval_samples 320
    python tests/experiments/benchmark.py --memory   # computed: what a step of roberta-base holds

It takes the script's own flags and those of `BenchmarkArguments`. Each repeat runs every variant once, in rotating
order: evaluate the initial weights, then train one epoch. Rates are medians over the repeats; ratios are medians of
each repeat's ratio to the published way, for a machine's speed drifts. Pytest does not collect this file.
"""

import ctypes
import gc
import math
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from unittest import mock

import psutil
import torch
from datasets import DatasetDict
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers import HfArgumentParser, RobertaConfig, RobertaForSequenceClassification, Trainer, TrainerCallback
from transformers import TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[1:3])
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
    config_overrides: str | None = HfArg(default=None, help="With --random_weights, e.g. num_hidden_layers=4")
    memory: bool = HfArg(default=False, help="Only print the computed memory of a step at roberta-base's shape.")
    doubled_batch: bool | None = HfArg(default=None, help="Also time one call on the doubled batch. Default: on CUDA.")
    num_train_epochs: float = HfArg(default=1.0, help="Epochs timed in each repeat.")
    report_to: list[str] = HfArg(default_factory=lambda: ["none"], help="Where curves go.")


class PublishedTrainer(Trainer):
    """The published way: two passes in training and in evaluation, labels passed to the model, library defaults."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args, alpha, **kwargs):
        super().__init__(*args, **kwargs)
        self.rdrop_loss = RDropLoss(alpha, self.args.label_smoothing_factor)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first, second = model(**inputs), model(**inputs)
        loss = self.rdrop_loss(first.logits, second.logits, inputs["labels"])[0]
        return (loss, first) if return_outputs else loss


class DoubledTrainer(RDropTrainer):
    """The paper's own trick: one call on the batch twice over, [x; x], instead of two calls."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        twice = {name: torch.cat([x, x]) for name, x in inputs.items() if name != "labels"}
        first, second = model(**twice).logits.chunk(2)
        return self.rdrop_loss(first, second, labels)[0]


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
    """Counts the tokens of its batches, computed and real (without padding), also where workers make them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.counts = multiprocessing.Array("q", 2)  # in memory that workers share

    def __call__(self, features):
        batch = super().__call__(features)
        with self.counts:
            self.counts[0] += batch["attention_mask"].numel()
            self.counts[1] += batch["attention_mask"].sum().item()
        return batch

    def take_share(self):
        """The share of padding since the last call."""
        computed, real = self.counts
        self.counts[:] = [0, 0]
        return 1 - real / computed


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def peak_memory():
    """Yields a list that holds, at the end, the peak in MiB: allocated on the GPU, or by how much this process grew."""
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
    try:
        yield peak
    finally:  # an error must not leave it watching for ever
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
        changes |= {"logging_nan_inf_filter": True, "dataloader_num_workers": 0}
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
    """The share of a training's time in forward, backward, optimizer (with clipping), and the rest, in that order.

    Times functions of the trainer and its accelerator by wrapping them, which they need not know.
    """
    spent = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}

    def timed(part, function):
        @wraps(function)  # torch looks for its mark on an optimizer's step
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
    trainer.accelerator.clip_grad_norm_ = timed("optimizer", trainer.accelerator.clip_grad_norm_)

    class TimeOptimizer(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **kwargs):
            optimizer.step = timed("optimizer", optimizer.step)

    trainer.add_callback(TimeOptimizer)
    trainer.train()
    clock = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Clock))
    spent["outside"] = clock.seconds - sum(spent.values())
    return {part: seconds / clock.seconds for part, seconds in spent.items()}


def loader_ms(trainer):
    """Milliseconds a batch, waited for and of this process's CPU, where nothing but loading is done."""
    batches = iter(trainer.get_train_dataloader())
    next(batches)  # starts the workers
    begin, cpu = time.perf_counter(), time.process_time()
    count = sum(1 for _ in batches)
    return [1e3 * seconds / count for seconds in (time.perf_counter() - begin, time.process_time() - cpu)]


def flops_per_step(trainer):
    """FLOPs of matrix products and attention, forward and backward, that a mean step of this training computes."""
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    return counter.get_total_flops() / trainer.state.global_step


def saved_bytes(trainer, batch_size, tokens):
    """Bytes that autograd keeps for the backward of one training step: distinct storages, parameters excluded."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()  # all stay alive, so that no address comes twice
        return tensor

    ids = torch.randint(5, trainer.model.config.vocab_size, (batch_size, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(batch_size) % 2}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model.train(), batch)
    for parameter in trainer.model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    assert loss.requires_grad  # and has kept the graph up to here
    return sum(storages.values())


def print_memory(batch_size=16, tokens=512):
    """Print the memory of a training step at roberta-base's shape, computed from the tensors that autograd saves.

    Stand-ins for a GPU with fp16: autocast to bf16, as wide; no attention dropout, for which the CPU has no fused
    attention; dropout whose mask takes one byte an element, as CUDA's. Only batches of 1 and 2 are run: what is saved
    grows linearly from there (of a fixed part: the half-precision copies of the weights that each pass makes).
    Left out: temporary tensors, the CUDA context, the caching allocator's slack. With checkpointing, also the one layer
    that the backward recomputes at a time.
    """
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    config.attention_probs_dropout_prob = 0.0
    model = RobertaForSequenceClassification(config)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # each pass by itself, as accelerate does
    args = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none", label_smoothing_factor=0.1)
    fixed = 4 * sum(parameter.nbytes for parameter in model.parameters())

    def dropout(tensor, p, training, inplace):
        return torch.native_dropout(tensor, p, training)[0]

    print(f"Computed, not measured: GiB of a step of roberta-base, {batch_size} x {tokens} tokens, half precision.")
    print("Weights, gradients and AdamW's two states in fp32 + what is kept for the backward = sum:\n")
    print("| | one pass | two passes (R-Drop) |\n|---|---|---|")
    with mock.patch("torch.nn.functional.dropout", dropout):
        for how in ("by default", "with `--activation_checkpointing`"):
            cells = []
            for alpha in (0.0, 5.0):
                trainer = RDropTrainer(model, args, alpha=alpha)
                one, two = saved_bytes(trainer, 1, tokens), saved_bytes(trainer, 2, tokens)
                saved = one + (batch_size - 1) * (two - one)
                cells.append("{:.1f} + {:.1f} = {:.1f}".format(*(x / 2**30 for x in (fixed, saved, fixed + saved))))
            print(f"| {how} | {' | '.join(cells)} |")
            model.activation_checkpointing_enable()


def main():
    parser = HfArgumentParser(BenchmarkArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    (args,) = parser.parse_args_into_dataclasses(look_for_args_file=False)
    if args.memory:
        print_memory()
        return
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
    tokenizer, model = load_model(args, names)
    data = tokenize(splits, tokenizer, args)
    # `tokenize` leaves the order of a train split as it is
    data["published order"] = tokenize(DatasetDict(train=splits["test"]), tokenizer, args)["train"]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    half_precision = args.fp16 or args.bf16
    pad_to_8 = half_precision and tokenizer.model_max_length % 8 == 0
    rest = (data, weights, tokenizer, model, pad_to_8)

    variants = ["published", "default", "group_by_length"]
    if args.doubled_batch or (args.doubled_batch is None and torch.cuda.is_available()):
        variants.append("doubled batch")
    few = DatasetDict({split: rows.select(range(min(len(rows), 32))) for split, rows in data.items()})
    for variant in variants:  # first calls allocate, choose kernels, compile
        measure(build(variant, args, few, *rest[1:]))
    repeats = []
    for repeat in range(args.repeats):
        turn = repeat % len(variants)
        figures = {}
        for variant in variants[turn:] + variants[:turn]:
            figures[variant] = measure(build(variant, args, *rest))
            print(f"repeat {repeat + 1}, {variant}: {figures[variant]}", file=sys.stderr)
        losses = [figure["eval loss"] for figure in figures.values()]
        assert all(math.isclose(loss, losses[0], rel_tol=1e-3) for loss in losses), f"{losses} differ in evaluation"
        repeats.append(figures)

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    shape = f"{model.num_parameters() / 1e6:.1f} M parameters, {tokenizer.model_max_length} tokens"
    precision = f"mixed precision: {args.mixed_precision}; batch {args.per_device_train_batch_size}"
    print(f"{device}; torch {torch.__version__}; {model.config.model_type}, {shape}; {precision}")
    print(f"{len(data['train'])} train and {len(data['test'])} test samples, {args.repeats} repeats\n")
    columns = [f"{part} {figure}" for part in ("train", "eval") for figure in ("samples/s", "padding", "MiB")]
    columns.append("eval loss")
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

    shares = profile(build("default", args, *rest))
    print("Time of a default training:", ", ".join(f"{part} {share:.1%}" for part, share in shares.items()))
    step = statistics.median(figures["default"]["train s/step"] for figures in repeats) * 1e3
    for workers in (0, 2):
        ms, cpu = loader_ms(build("default", replace(args, dataloader_num_workers=workers), *rest))
        of_main = f"{cpu:.2f} ms of the main process's CPU"
        print(f"Loader with {workers} workers: {ms:.2f} ms a batch, {of_main}, beside {step:.1f} ms a step")
    if "doubled batch" in variants:
        peak = next((peak for card, peak in PEAK.items() if card in device), None)
        for variant in variants:
            seconds = statistics.median(figures[variant]["train s/step"] for figures in repeats)
            flops = flops_per_step(build(variant, args, *rest))
            share = f", {flops / seconds / peak:.1%} of the card's dense fp16 peak" if peak else ""
            rate = f"{flops / 1e9:.2f} GFLOP, {flops / seconds / 1e12:.3f} TFLOP/s{share}"
            print(f"{variant}: {seconds * 1e3:.1f} ms a step for {rate}")


if __name__ == "__main__":
    main()
