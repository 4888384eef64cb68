"""How fast train_rdrop.py is beside the published way, on the same model, data and seed, in one process.

    python tests/experiments/benchmark.py                 # the tiny model and data of tiny_imdb.py
    OMP_NUM_THREADS=1 python tests/experiments/benchmark.py --model_name_or_path FOLDER --random_weights \\
        --dataset_name FOLDER_OR_HUB_ID --max_train_samples 320 --max_eval_samples 320
    python tests/experiments/benchmark.py --memory --model_name_or_path FOLDER --dataset_name FOLDER_OR_HUB_ID
    python tests/experiments/benchmark.py --rows 100000   # seconds and memory of reading a file

Its own flags are below; every other flag goes to train_rdrop.py as it is. Each repeat runs every variant once, in
rotating order: evaluate the initial weights, then train. Times are by the clock on a GPU. Without one they are the CPU
time of this process, on all its threads, for others may use the machine; threads that wait for each other count, too,
so that one thread is best. Figures are medians over the repeats; ratios are taken in each repeat, for a machine's speed
drifts. Pytest does not collect this file.
"""

import argparse
import csv
import ctypes
import gc
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import torch
from datasets import DatasetDict
from transformers import AutoConfig, AutoModelForSequenceClassification, DataCollatorWithPadding
from transformers import RobertaConfig, RobertaForSequenceClassification, Trainer, TrainerCallback
from transformers import TrainingArguments, set_seed

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[1:3])
import tiny_imdb

from train_rdrop import RDropLoss, RDropTrainer, compute_metrics, load_model, load_splits, load_tokenizer
from train_rdrop import parse_args, split_by_length, tokenize

# The flags that make each variant; the published way has Trainer's own defaults where the script has others.
VARIANTS = {
    "published": ["--logging_nan_inf_filter", "true", "--dataloader_num_workers", "0"],
    "default": [],
    "buckets 2": ["--length_buckets", "2"],
    "buckets 4": ["--length_buckets", "4"],
    "group_by_length": ["--train_sampling_strategy", "group_by_length"],
    "doubled batch": [],
}
DEFAULTS = ["--report_to", "none", "--num_train_epochs", "1"]
FIXED = ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
FIXED += ["--length_buckets", "1", "--disable_tqdm", "true"]


class PublishedTrainer(Trainer):
    """The published way: two passes in training and in evaluation, labels passed to the model."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args, alpha, length_buckets, **kwargs):
        super().__init__(*args, **kwargs)
        self.rdrop_loss = RDropLoss(alpha, self.args.label_smoothing_factor)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first, second = model(**inputs), model(**inputs)
        loss = self.rdrop_loss(first.logits, second.logits, inputs["labels"])
        return (loss, first) if return_outputs else loss


class DoubledTrainer(PublishedTrainer):
    """The paper's own trick: one call on the batch twice over, [x; x], instead of two calls; one pass in evaluation."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        if not model.training:
            logits = model(**inputs).logits
            return self.rdrop_loss(logits, logits, labels), {"logits": logits}
        twice = {name: torch.cat([x, x]) for name, x in inputs.items()}
        first, second = model(**twice).logits.chunk(2)
        return self.rdrop_loss(first, second, labels)


TRAINERS = {"published": PublishedTrainer, "doubled batch": DoubledTrainer}


class Clock(TrainerCallback):
    """Times a training from the first step's begin to the last step's end."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.begin = seconds()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.seconds = seconds() - self.begin


class TokenCounter:
    """Counts the tokens that a model is given, computed and real: not the collator's, for buckets cut its padding."""

    def __init__(self, model):
        self.computed = self.real = 0
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    @torch.compiler.disable  # else a compiled model would be compiled again for each count
    def count(self, model, args, inputs):
        self.computed += inputs["input_ids"].numel()
        self.real += inputs["attention_mask"].sum()  # stays on the GPU: its figure would have to be waited for

    def take_share(self):
        """The share of padding since the last call."""
        share = 1 - float(self.real) / self.computed
        self.computed = self.real = 0
        return share


def seconds():
    """The clock, once the GPU has done all its work; without a GPU the CPU time of this process."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()  # without the workers of a data loader, of which there are none by default


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


# -----------------------------------------------------------------------------
# Throughput


def load(args, random_weights):
    """Tokenizer, model, and the data: `train`, `eval`, and `eval` in file order as `published`."""
    splits = load_splits(args, args.seed)
    names = splits["train"].features["labels"].names
    tokenizer = load_tokenizer(args)
    if random_weights:
        config = AutoConfig.from_pretrained(args.model_name_or_path, num_labels=len(names))
        if args.config_overrides:
            config.update_from_string(args.config_overrides)
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = load_model(args, tokenizer, names)
    chooser = "validation" if "validation" in splits else "test"
    data = tokenize(DatasetDict(train=splits["train"], eval=splits[chooser]), tokenizer)
    # `tokenize` leaves the order of a train split as it is
    data["published"] = tokenize(DatasetDict(train=splits[chooser]), tokenizer)["train"]
    return tokenizer, model, data


def build(variant, argv, data, weights, tokenizer, model):
    """A trainer of `variant`, the model at its initial weights."""
    args = parse_args([*argv, *FIXED, *VARIANTS[variant]])
    model.load_state_dict(weights)
    multiple_of = 8 if args.mixed_precision != "no" and tokenizer.model_max_length % 8 == 0 else None
    if variant == "published":
        multiple_of = None
    return TRAINERS.get(variant, RDropTrainer)(
        model=model,
        args=args,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple_of),
        train_dataset=data["train"],
        eval_dataset=data["published" if variant == "published" else "eval"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        callbacks=[Clock()],
        alpha=args.rdrop_alpha,
        length_buckets=args.length_buckets,
    )


def measure(trainer, counter):
    """Evaluate, then train; returns the figures of both, and of an epoch."""
    figures = {}
    begin = seconds()
    with peak_memory() as peak:
        figures["eval loss"] = trainer.evaluate()["eval_loss"]
    figures["eval s"] = seconds() - begin
    figures["eval samples/s"] = len(trainer.eval_dataset) / figures["eval s"]
    figures["eval padding"], figures["eval MiB"] = counter.take_share(), peak[0]
    with peak_memory() as peak:
        trainer.train()
    clock = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Clock))
    figures["train s"] = clock.seconds / trainer.args.num_train_epochs
    figures["train samples/s"] = len(trainer.train_dataset) / figures["train s"]
    figures["train padding"], figures["train MiB"] = counter.take_share(), peak[0]
    figures["epoch s"] = figures["train s"] + figures["eval s"]
    figures["ms/step"] = 1e3 * clock.seconds / trainer.state.global_step
    return figures


def loader_ms(trainer):
    """Milliseconds a batch, waited for and of this process's CPU, where nothing but loading is done."""
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
    variants = list(VARIANTS)
    if not (options.doubled_batch or torch.cuda.is_available()):
        variants.remove("doubled batch")
    few = DatasetDict({split: rows.select(range(min(len(rows), 32))) for split, rows in data.items()})
    for variant in variants:  # first calls allocate, choose kernels, compile
        measure(build(variant, argv, few, weights, tokenizer, model), counter)
    repeats = []
    for repeat in range(options.repeats):
        turn = repeat % len(variants)
        figures = {}
        for variant in variants[turn:] + variants[:turn]:
            figures[variant] = measure(build(variant, argv, data, weights, tokenizer, model), counter)
            print(f"repeat {repeat + 1}, {variant}: {figures[variant]}", file=sys.stderr)
        losses = [figure["eval loss"] for figure in figures.values()]
        assert all(math.isclose(loss, losses[0], rel_tol=1e-3) for loss in losses), f"{losses} differ in evaluation"
        repeats.append(figures)

    device, time_by = f"CPU, {torch.get_num_threads()} threads", "CPU time of the process"
    if torch.cuda.is_available():
        device, time_by = torch.cuda.get_device_name(), "the clock"
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
        of_main = f"{cpu:.2f} ms of the main process's CPU"
        print(f"Loader with {workers} workers: {ms:.2f} ms a batch, {of_main}, beside {step:.1f} ms a step")


def print_figures(variants, repeats):
    columns = [f"{part} {figure}" for part in ("train", "eval") for figure in ("samples/s", "padding", "MiB")]
    columns += ["epoch s", "eval loss"]
    print(f"| variant | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    formats = {"padding": ".1%", "MiB": ".0f", "loss": ".5f"}
    for variant in variants:
        cells = []
        for column in columns:
            figure = statistics.median(figures[variant][column] for figures in repeats)
            cells.append(format(figure, formats.get(column.split()[-1], ".1f")))
        print(f"| {variant} | {' | '.join(cells)} |")


def print_ratios(variants, repeats):
    print("\nTimes as fast as the published way: median (each repeat)\n")
    print("| variant | training | evaluation | whole epoch |\n|---|---|---|---|")
    for variant in variants:
        cells = []
        for column in ("train s", "eval s", "epoch s"):
            ratios = [figures["published"][column] / figures[variant][column] for figures in repeats]
            cells.append(f"{statistics.median(ratios):.2f} ({' '.join(f'{ratio:.2f}' for ratio in ratios)})")
        print(f"| {variant} | {' | '.join(cells)} |")
    print()


# -----------------------------------------------------------------------------
# Computed memory


def saved_bytes(trainer, batch_size, tokens, padded):
    """Bytes that autograd keeps for the backward of one training step: distinct storages, parameters excluded."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()  # all stay alive, so that no address comes twice
        return tensor

    ids = torch.randint(5, trainer.model.config.vocab_size, (batch_size, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(batch_size) % 2}
    if padded:  # then attention keeps a mask, too
        batch["attention_mask"][0, -1] = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model.train(), batch)
    for parameter in trainer.model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    assert loss.requires_grad  # and has kept the graph up to here
    return sum(storages.values())


def bytes_by_shape(trainer, padded):
    """A function of rows and tokens: the bytes that a step keeps, after batches of 1 and 2 rows at three lengths.

    A fixed part (half-precision copies of the weights, made by each call of the model), and for each row one linear in
    its tokens, and one quadratic: the mask of a padded batch, in each layer. Attention itself is not kept.
    """
    tokens = np.array([64, 128, 192])  # the same curve as up to 512, in less time
    one, two = ([saved_bytes(trainer, rows, n, padded) for n in tokens.tolist()] for rows in (1, 2))
    row = np.subtract(two, one)
    fixed = np.mean(one - row)
    curve = np.polyfit(tokens, row, 2)
    return lambda rows, n: fixed + rows * np.polyval(curve, n)


def kept_bytes(step_bytes, lengths, batch_size, buckets):
    """Bytes kept by each step of an epoch over texts of `lengths`, shuffled; widths are multiples of 8, as on a GPU."""
    lengths = np.random.default_rng(0).permutation(lengths)
    lengths = torch.from_numpy(lengths[: len(lengths) // batch_size * batch_size])
    steps = []
    for batch in lengths.split(batch_size):
        mask = torch.arange(-(-max(batch) // 8) * 8) < batch[:, None]
        _, parts = split_by_length({"attention_mask": mask}, buckets, 8)
        steps.append(sum(step_bytes(*part["attention_mask"].shape) for part in parts))
    return np.array(steps)


def print_memory(lengths, batch_size):
    """Print the memory of a training step at roberta-base's shape, computed from the tensors that autograd saves.

    Stand-ins for a GPU with fp16: autocast to bf16, as wide; no attention dropout, for which the CPU has no fused
    attention; dropout whose mask takes one byte an element, as CUDA's. Left out: temporary tensors, the CUDA context,
    the caching allocator's slack; with checkpointing, also the one layer that the backward recomputes at a time.
    """
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    config.attention_probs_dropout_prob = 0.0
    model = RobertaForSequenceClassification(config)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # each pass by itself, as accelerate does
    args = TrainingArguments(tempfile.gettempdir(), use_cpu=True, report_to="none", label_smoothing_factor=0.1)
    fixed = 4 * sum(parameter.nbytes for parameter in model.parameters())

    def dropout(tensor, p, training, inplace):
        return torch.native_dropout(tensor, p, training)[0]

    def cell(kept):
        parts = [x / 2**30 for x in (fixed, np.mean(kept), fixed + np.mean(kept))]
        largest = f" (largest {(fixed + np.max(kept)) / 2**30:.1f})" if np.size(kept) > 1 else ""
        return "{:.1f} + {:.1f} = {:.1f}".format(*parts) + largest

    columns = {}
    with mock.patch("torch.nn.functional.dropout", dropout):
        for how in ("", ", `--activation_checkpointing`"):
            once, twice = (RDropTrainer(model, args, alpha=alpha) for alpha in (0.0, 5.0))
            ratio = saved_bytes(twice, 1, 64, padded=True) / saved_bytes(once, 1, 64, padded=True)
            assert math.isclose(ratio, 2, rel_tol=1e-3), f"two passes keep {ratio} times the memory of one"
            full, padded = bytes_by_shape(once, padded=False), bytes_by_shape(once, padded=True)
            kept = [kept_bytes(padded, lengths, batch_size, buckets) for buckets in (1, 2, 4)]
            kept = [full(batch_size, 512), *kept]
            columns["one pass" + how] = [cell(step) for step in kept]
            columns["two passes (R-Drop)" + how] = [cell(2 * step) for step in kept]
            model.activation_checkpointing_enable()

    print(f"\nComputed, not measured: GiB of a step of roberta-base with {batch_size} texts, half precision.")
    print("Weights, gradients and AdamW's two states in fp32 + what is kept for the backward = sum.")
    print(f"The data's lengths: {len(lengths)} texts, on average {np.mean(lengths):.0f} tokens; mean over the steps\n")
    print(f"| texts | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    names = ["all of 512 tokens", "the data's lengths", "`--length_buckets 2`", "`--length_buckets 4`"]
    for name, *cells in zip(names, *columns.values(), strict=True):
        print(f"| {name} | {' | '.join(cells)} |")


# -----------------------------------------------------------------------------
# The data part


def read_once(path):
    """Print the CPU seconds of `load_splits` on one file, and this process's peak of memory."""
    args = parse_args(["--train_file", path, "--validation_fraction", "0.1", "--report_to", "none"])
    begin = time.process_time()
    load_splits(args, args.seed)
    spent = time.process_time() - begin
    print(json.dumps([spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10]))


def print_reading(rows, folder):
    """Print what reading a CSV file of `rows` rows costs, first and from the cache, beside one of 100 rows."""
    env = os.environ | {"HF_DATASETS_CACHE": f"{folder}/cache"}
    rng = random.Random(0)
    lines = ["| rows | MB | read | CPU s | peak MiB |\n|---|---|---|---|---|"]
    for count in (100, rows):
        path = f"{folder}/{count}.csv"
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for number in range(count):
                text = " ".join(rng.choices(tiny_imdb.NEUTRAL, k=225))  # about 1.1 kB
                writer.writerow([text, ("neg", "pos")[number % 2]])
        for how in ("first", "from the cache"):
            command = [sys.executable, __file__, "--read", path]
            said = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
            spent, peak = json.loads(said.splitlines()[-1])
            lines.append(f"| {count} | {os.path.getsize(path) / 1e6:.1f} | {how} | {spent:.1f} | {peak:.0f} |")
    print("\nThe data part alone, load_splits. The peak is that of a whole process, with its libraries and the part of")
    print("the cache that it has mapped.\n")
    print("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repeats", type=int, default=4, help="how often every variant runs (default: 4)")
    parser.add_argument("--random_weights", action="store_true", help="make the model from its config: same cost")
    parser.add_argument("--doubled_batch", action="store_true", help="time the doubled batch without a GPU, too")
    parser.add_argument("--memory", action="store_true", help="only compute the memory of a step of roberta-base")
    parser.add_argument("--rows", type=int, help="only read a made-up file of so many rows")
    options, flags = parser.parse_known_args()
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
    if sys.argv[1:2] == ["--read"]:
        read_once(sys.argv[2])
    else:
        main()
