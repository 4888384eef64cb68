"""Compare the speed of train_rdrop.py with that of the published way, on the same model, data and seed.

    python tests/experiments/benchmark.py                 # the tiny model and data of tiny_imdb.py
    OMP_NUM_THREADS=1 python tests/experiments/benchmark.py --model_name_or_path FOLDER --random_weights \\
        --dataset_name FOLDER_OR_HUB_ID --max_train_samples 320 --max_eval_samples 320
    python tests/experiments/benchmark.py --memory --model_name_or_path FOLDER --dataset_name FOLDER_OR_HUB_ID
    python tests/experiments/benchmark.py --rows 100000   # time and memory of reading a file

All flags except those listed below are passed on to train_rdrop.py. Each repeat runs every variant once, in rotating
order: it evaluates the initial weights, then trains. On a GPU, times are wall-clock times. On a CPU they are the CPU
time of this process, since other work may share the machine; use one thread, as waiting threads count, too. Figures are
medians over the repeats. Ratios are computed within each repeat, because the speed of a machine drifts. Needs Linux.
"""

import argparse
import csv
import ctypes
import gc
import math
import multiprocessing
import os
import random
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from datasets import DatasetDict
from transformers import AutoConfig, AutoModelForSequenceClassification, DataCollatorWithPadding
from transformers import PrinterCallback, RobertaConfig, RobertaForSequenceClassification, Trainer, TrainerCallback
from transformers import TrainingArguments, set_seed

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[1:3])
import tiny_imdb

from train_rdrop import RDropLoss, RDropTrainer, compute_metrics, load_model, load_splits, load_tokenizer
from train_rdrop import parse_args, split_by_length, tokenize

VARIANTS = {
    "published": ["--dataloader_num_workers", "0"],
    "default": [],
    "buckets 2": ["--length_buckets", "2"],
    "buckets 4": ["--length_buckets", "4"],
    "group_by_length": ["--train_sampling_strategy", "group_by_length"],
    "doubled batch": [],
}
DEFAULTS = ["--report_to", "none", "--num_train_epochs", "1"]
DEFAULTS += [] if torch.cuda.is_available() else ["--use_cpu"]  # --bf16 needs it
FIXED = ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
FIXED += ["--length_buckets", "1", "--disable_tqdm", "true"]


class PublishedTrainer(Trainer):
    """The published way: two passes in training and in evaluation, with the labels passed to the model."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args, alpha, length_buckets, **kwargs):
        super().__init__(*args, **kwargs)
        self.rdrop_loss = RDropLoss(alpha, self.args.label_smoothing_factor)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first, second = model(**inputs), model(**inputs)
        loss = self.rdrop_loss(first.logits, second.logits, inputs["labels"])
        return (loss, first) if return_outputs else loss


class DoubledTrainer(PublishedTrainer):
    """The paper's implementation: one call on the doubled batch [x; x] in training, one pass in evaluation."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        if not model.training:
            logits = model(**inputs).logits
            return self.rdrop_loss(logits, logits, labels), {"logits": logits}
        first, second = model(**{name: torch.cat([x, x]) for name, x in inputs.items()}).logits.chunk(2)
        return self.rdrop_loss(first, second, labels)


TRAINERS = {"published": PublishedTrainer, "doubled batch": DoubledTrainer}


class Clock(TrainerCallback):
    """Measures the time of training, from the beginning of the first step to the end of the last."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.begin = seconds()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.seconds = seconds() - self.begin


class TokenCounter:
    """Counts the tokens that a model receives, with and without padding. Buckets cut the padding of the collator."""

    def __init__(self, model):
        self.computed = self.real = 0
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    @torch.compiler.disable  # a compiled model would be recompiled for every count
    def count(self, model, args, inputs):
        self.computed += inputs["input_ids"].numel()
        self.real += inputs["attention_mask"].sum()  # stays on the GPU, to avoid a synchronization

    def take_share(self):
        """The share of padding since the last call."""
        share = 1 - float(self.real) / self.computed
        self.computed = self.real = 0
        return share


def seconds():
    """Wall-clock time after all work of the GPU; without a GPU, the CPU time of this process."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def memory(kind="VmHWM"):
    """Peak memory of this process in MiB, or its memory now (VmRSS)."""
    return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


def measured(function):
    """Result of `function()`, its seconds, and its peak in MiB: allocated on the GPU, or the growth of this process."""
    on_gpu, gpu = torch.cuda.is_available(), torch.cuda
    if on_gpu:
        gpu.empty_cache()
        gpu.reset_peak_memory_stats()
    else:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, begin = memory("VmRSS"), seconds()
    result = function()
    spent = seconds() - begin
    return result, spent, gpu.max_memory_allocated() / 2**20 if on_gpu else memory() - before


# -----------------------------------------------------------------------------
# Throughput


def load(args, random_weights):
    """Tokenizer, model, and the data: `train`, `eval`, and `published`, which is `eval` in file order."""
    splits = load_splits(args, args.seed)
    names = splits["train"].features["labels"].names
    tokenizer = load_tokenizer(args)
    if random_weights:
        config = AutoConfig.from_pretrained(args.model_name_or_path, num_labels=len(names))
        if args.config_overrides:
            config.update_from_string(args.config_overrides)
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = load_model(args, names)
    rows = splits.get("validation", splits.get("test"))
    data = tokenize(DatasetDict(train=splits["train"], eval=rows), tokenizer)
    data["published"] = tokenize(DatasetDict(train=rows), tokenizer)["train"]  # `tokenize` sorts all splits but train
    return tokenizer, model, data


def build(variant, argv, data, weights, tokenizer, model):
    """A trainer of `variant`, with the model reset to its initial weights."""
    args = parse_args([*argv, *FIXED, *VARIANTS[variant]])
    model.load_state_dict(weights)
    pad = variant != "published" and args.mixed_precision != "no" and tokenizer.model_max_length % 8 == 0
    trainer = TRAINERS.get(variant, RDropTrainer)(
        model=model,
        args=args,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if pad else None),
        train_dataset=data["train"],
        eval_dataset=data["published" if variant == "published" else "eval"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        callbacks=[Clock()],
        alpha=args.rdrop_alpha,
        length_buckets=args.length_buckets,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(trainer, counter):
    """Evaluate, then train; returns the figures of both, and of an epoch."""
    figures = {}
    metrics, figures["eval s"], figures["eval MiB"] = measured(trainer.evaluate)
    figures["eval loss"], figures["eval padding"] = metrics["eval_loss"], counter.take_share()
    figures["eval samples/s"] = len(trainer.eval_dataset) / figures["eval s"]
    _, _, figures["train MiB"] = measured(trainer.train)
    clock = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Clock))
    figures["train s"], figures["train padding"] = clock.seconds / trainer.args.num_train_epochs, counter.take_share()
    figures["train samples/s"] = len(trainer.train_dataset) / figures["train s"]
    figures["epoch s"] = figures["train s"] + figures["eval s"]
    figures["ms/step"] = 1e3 * clock.seconds / trainer.state.global_step
    return figures


def loader_ms(trainer):
    """Wall-clock and CPU milliseconds per batch that this process spends on loading alone."""
    batches = iter(trainer.get_train_dataloader())
    next(batches)  # starts the workers
    begin, cpu = time.perf_counter(), time.process_time()
    count = sum(1 for _ in batches)
    return [1e3 * spent / count for spent in (time.perf_counter() - begin, time.process_time() - cpu)]


def compare(argv, options):
    """Measure all variants, and print their figures."""
    args = parse_args([*argv, *FIXED])
    set_seed(args.seed)
    tokenizer, model, data = load(args, options.random_weights)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    counter = TokenCounter(model)
    gc.freeze()  # so that collections need not visit the objects of imported libraries
    variants = list(VARIANTS)
    few = DatasetDict({split: rows.select(range(min(len(rows), 32))) for split, rows in data.items()})
    for variant in variants:  # the first calls allocate memory, choose kernels and compile
        measure(build(variant, argv, few, weights, tokenizer, model), counter)
    repeats = []
    for repeat in range(options.repeats):
        turn = repeat % len(variants)
        figures = {}
        for variant in variants[turn:] + variants[:turn]:
            figures[variant] = measure(build(variant, argv, data, weights, tokenizer, model), counter)
            print(f"repeat {repeat + 1}, {variant}: {figures[variant]}", file=sys.stderr)
        losses = [figure["eval loss"] for figure in figures.values()]
        assert all(math.isclose(loss, losses[0], rel_tol=1e-3) for loss in losses), (
            f"evaluation losses differ: {losses}"
        )
        repeats.append(figures)

    device, time_by = f"CPU, {torch.get_num_threads()} threads", "CPU time of the process"
    if torch.cuda.is_available():
        device, time_by = torch.cuda.get_device_name(), "wall-clock time"
    shape = f"{model.num_parameters() / 1e6:.1f} M parameters, {tokenizer.model_max_length} tokens"
    precision = f"mixed precision: {args.mixed_precision}; batch {args.per_device_train_batch_size}"
    print(f"\n{device}; torch {torch.__version__}; {model.config.model_type}, {shape}; {precision}")
    print(f"{len(data['train'])} train and {len(data['eval'])} eval samples; medians of {options.repeats} repeats")
    print(f"Seconds are {time_by}.\n")
    print_figures(variants, repeats)
    print_ratios(variants, repeats)
    step = statistics.median(figures["default"]["ms/step"] for figures in repeats)
    for workers in ("0", "2"):
        flags = [*argv, "--dataloader_num_workers", workers]
        ms, cpu = loader_ms(build("default", flags, data, weights, tokenizer, model))
        print(f"Loader with {workers} workers: {ms:.2f} ms per batch,", end=" ")
        print(f"{cpu:.2f} ms of CPU time in the main process; a training step: {step:.1f} ms")


def print_table(columns, rows):
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for cells in rows:
        print(f"| {' | '.join(cells)} |")


def print_figures(variants, repeats):
    columns = [f"{part} {figure}" for part in ("train", "eval") for figure in ("samples/s", "padding", "MiB")]
    columns += ["epoch s", "eval loss"]
    formats = {"padding": ".1%", "MiB": ".0f", "loss": ".5f"}

    def cell(variant, column):
        figure = statistics.median(figures[variant][column] for figures in repeats)
        return format(figure, formats.get(column.split()[-1], ".1f"))

    rows = ([variant, *(cell(variant, column) for column in columns)] for variant in variants)
    print_table(["variant", *columns], rows)


def print_ratios(variants, repeats):
    def cell(variant, column):
        ratios = [figures["published"][column] / figures[variant][column] for figures in repeats]
        return f"{statistics.median(ratios):.2f} ({' '.join(f'{ratio:.2f}' for ratio in ratios)})"

    print("\nSpeed relative to the published way: median (each repeat)\n")
    rows = ([variant, *(cell(variant, name) for name in ("train s", "eval s", "epoch s"))] for variant in variants)
    print_table(["variant", "training", "evaluation", "whole epoch"], rows)
    print()


# -----------------------------------------------------------------------------
# Computed memory


def saved_bytes(trainer, batch_size, tokens, padded):
    """Bytes that autograd keeps for the backward of one training step: distinct storages, without parameters."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()  # all of them stay alive, so addresses are unique
        return tensor

    ids = torch.randint(5, trainer.model.config.vocab_size, (batch_size, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(batch_size) % 2}
    if padded:  # attention then keeps a mask, too
        batch["attention_mask"][0, -1] = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model.train(), batch)
    for parameter in trainer.model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    assert loss.requires_grad  # and has kept the graph until here
    return sum(storages.values())


def bytes_by_shape(trainer, padded):
    """A function of rows and tokens: the bytes that a step keeps, fitted to batches of 1 and 2 rows at three lengths.

    They have a fixed part (half-precision copies of the weights, made by each call of the model), and in each row a
    part linear and a part quadratic in its tokens (the mask of a padded batch, in each layer).
    """
    tokens = np.array([64, 128, 192])  # the same curve as up to 512, in less time
    one, two = ([saved_bytes(trainer, rows, n, padded) for n in tokens.tolist()] for rows in (1, 2))
    row = np.subtract(two, one)
    fixed = np.mean(one - row)
    curve = np.polyfit(tokens, row, 2)
    return lambda rows, n: fixed + rows * np.polyval(curve, n)


def kept_bytes(step_bytes, lengths, batch_size, buckets):
    """Bytes kept by each step of an epoch over shuffled texts of `lengths`; widths are multiples of 8, as on a GPU."""
    lengths = np.random.default_rng(0).permutation(lengths)
    lengths = torch.from_numpy(lengths[: len(lengths) // batch_size * batch_size])
    steps = []
    for batch in lengths.split(batch_size):
        mask = torch.arange(-(-max(batch) // 8) * 8) < batch[:, None]
        groups, _ = split_by_length({"attention_mask": mask}, buckets, 8)
        steps.append(sum(step_bytes(*group["attention_mask"].shape) for group in groups))
    return np.array(steps)


def print_memory(lengths, batch_size):
    """Print the memory of a training step of roberta-base, computed from the tensors that autograd saves.

    A CPU stands in for a GPU with fp16: autocast to bf16, which is as wide; no attention dropout, for which the CPU has
    no fused attention; dropout with a mask of one byte per element, as on CUDA. Not included are temporary tensors, the
    CUDA context, the slack of the caching allocator and, with checkpointing, the layer that is being recomputed.
    """
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    config.attention_probs_dropout_prob = 0.0
    model = RobertaForSequenceClassification(config)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # per pass, as in accelerate
    args = TrainingArguments(tempfile.gettempdir(), use_cpu=True, report_to="none", label_smoothing_factor=0.1)
    fixed = 4 * sum(parameter.nbytes for parameter in model.parameters())

    def dropout(tensor, p, training, inplace):
        return torch.native_dropout(tensor, p, training)[0]

    def cell(kept):
        parts = [x / 2**30 for x in (fixed, np.mean(kept), fixed + np.mean(kept))]
        largest = f" (largest {(fixed + np.max(kept)) / 2**30:.1f})" if np.size(kept) > 1 else ""
        return "{:.1f} + {:.1f} = {:.1f}".format(*parts) + largest

    columns = {"texts": ["all of 512 tokens", "the data's lengths", "`--length_buckets 2`", "`--length_buckets 4`"]}
    with mock.patch("torch.nn.functional.dropout", dropout):
        for how in ("", ", `--activation_checkpointing`"):
            once, twice = (RDropTrainer(model, args, alpha=alpha) for alpha in (0.0, 5.0))
            ratio = saved_bytes(twice, 1, 64, padded=True) / saved_bytes(once, 1, 64, padded=True)
            assert math.isclose(ratio, 2, rel_tol=1e-3), f"two passes keep {ratio} times the memory of one"
            full, padded = bytes_by_shape(once, padded=False), bytes_by_shape(once, padded=True)
            kept = [full(batch_size, 512)]
            kept += [kept_bytes(padded, lengths, batch_size, buckets) for buckets in (1, 2, 4)]
            columns[f"one pass{how}"] = [cell(step) for step in kept]
            columns[f"two passes (R-Drop){how}"] = [cell(2 * step) for step in kept]
            model.activation_checkpointing_enable()

    print(f"\nComputed, not measured: GiB of a training step of roberta-base with {batch_size} texts, half precision.")
    print("Weights, gradients and AdamW's two states in fp32 + what is kept for the backward = sum.")
    print(f"The data's lengths: {len(lengths)} texts, {np.mean(lengths):.0f} tokens on average; mean over the steps.\n")
    print_table(columns, zip(*columns.values(), strict=True))


# -----------------------------------------------------------------------------
# Reading data


def read_once(path):
    """CPU seconds of `load_splits` on one file, and the peak memory of this process in MiB."""
    args = parse_args(["--train_file", path, "--validation_fraction", "0.1", "--report_to", "none"])
    begin = time.process_time()
    load_splits(args, args.seed)
    return time.process_time() - begin, memory()


def print_reading(rows_asked, folder):
    """Print what it takes to read a CSV file of `rows_asked` rows, first and from the cache, beside one of 100 rows."""
    rng = random.Random(0)
    rows = []
    for count in (100, rows_asked):
        path = f"{folder}/{count}.csv"
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for number in range(count):
                text = " ".join(rng.choices(tiny_imdb.NEUTRAL, k=225))  # about 1.1 kB
                writer.writerow([text, ("neg", "pos")[number % 2]])
        for how in ("first", "from the cache"):
            os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as new_process:
                spent, peak = new_process.submit(read_once, path).result()
            rows.append([str(count), f"{os.path.getsize(path) / 1e6:.1f}", how, f"{spent:.1f}", f"{peak:.0f}"])
    print(
        "\n`load_splits` alone. The peak is that of a whole process, including its libraries and the part of the cache"
    )
    print("that it has mapped.\n")
    print_table(["rows", "MB", "read", "CPU s", "peak MiB"], rows)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repeats", type=int, default=4, help="number of runs of each variant (default: 4)")
    parser.add_argument("--random_weights", action="store_true", help="build the model from its config: same cost")
    parser.add_argument("--memory", action="store_true", help="only compute the memory of a step of roberta-base")
    parser.add_argument("--rows", type=int, help="only read a made-up file with this number of rows")
    options, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if options.rows:
            print_reading(options.rows, folder)
            return
        tiny_imdb.write_model(f"{folder}/model")
        tiny_imdb.write_data(f"{folder}/data")
        tiny = ["--model_name_or_path", f"{folder}/model", "--dataset_name", f"{folder}/data"]
        argv = [*tiny, *DEFAULTS, *flags, "--output_dir", f"{folder}/results"]
        if options.memory:
            args = parse_args(argv)
            train = DatasetDict(train=load_splits(args, args.seed)["train"])
            lengths = tokenize(train, load_tokenizer(args))["train"]["length"][:]
            print_memory(lengths, args.per_device_train_batch_size)
        else:
            compare(argv, options)


if __name__ == "__main__":
    main()
