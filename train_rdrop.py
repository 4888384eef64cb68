#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "scikit-learn==1.9.1", "numpy==2.4.6",
#                 "accelerate==1.15.0", "tensorboard==2.21.0"]
# ///
"""Fine-tune RoBERTa (or any encoder) for text classification with R-Drop and label smoothing.

    python train_rdrop.py                           # the published run: roberta-base on IMDB
    python train_rdrop.py --train_file reviews.csv --validation_fraction 0.1 --output_dir results_mine
    torchrun --nproc_per_node 2 train_rdrop.py      # two GPUs
    tensorboard --logdir logs_rdrop                 # the curves

R-Drop (Liang et al., NeurIPS 2021, arXiv 2106.14448) runs each batch through the model twice. Dropout draws other
masks each time; the loss asks both outputs for the label and both to agree:

    loss = 1/2 (CE_ls(z1, y) + CE_ls(z2, y)) + alpha * 1/2 (KL(p2 || p1) + KL(p1 || p2)),  p = softmax(z)

Contents: arguments, R-Drop (loss and trainer), metrics, data, model, checkpoints, main.
"""

import csv
import gc
import glob
import gzip
import hashlib
import itertools
import json
import logging
import math
import os
import re
import reprlib
import sys
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from sklearn.metrics import accuracy_score, classification_report, f1_score, roc_auc_score
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers import EarlyStoppingCallback, HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

logger = logging.getLogger("train_rdrop")
short = reprlib.Repr()
short.maxstring, short.maxother, short.maxlist, short.maxdict = 60, 60, 20, 20
show = short.repr  # users' values: quoted, cut, and without terminal escapes
METRICS = ("accuracy", "f1", "auc", "loss")  # of `compute_metrics`, in flags, last lines and HPARAMS
REPORT = "classification_report.txt"
RESULTS = ("eval_results.json", "test_results.json", "all_results.json", "predictions.csv", REPORT)


def say(message: str):
    """Print, in one of several processes."""
    PartialState().print(message, flush=True)


class UserError(Exception):
    """A mistake in flags, files or names. Its message is all that the user sees; other errors keep their traceback."""


# -----------------------------------------------------------------------------
# Arguments: our own flags, and those of TrainingArguments, whose defaults become the recipe's


def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    _argument_group_name = "model"
    model_name_or_path: str = flag("FacebookAI/roberta-base", "Hub id or folder of the encoder")
    config_overrides: str | None = flag(None, "Changes of its config: hidden_dropout_prob=0.2,...")


@dataclass
class DataArguments:
    _argument_group_name = "data"
    dataset_name: str = flag("stanfordnlp/imdb", "Hub id or folder of the data set")
    dataset_config_name: str | None = flag(None, "Its configuration, if it has several")
    train_file: str | None = flag(None, "In place of a data set: csv, tsv, json, jsonl or parquet")
    validation_file: str | None = flag(None, "Like it; chooses the checkpoint")
    test_file: str | None = flag(None, "Like it; evaluated at the end")
    quoting: Literal["minimal", "none"] = flag("minimal", "none: quotes are plain characters")
    validation_split: str = flag("validation", "Split that chooses the checkpoint. Or: none")
    test_split: str = flag("test", "Split evaluated at the end. Or: none")
    validation_fraction: float = flag(0.0, "Share of train held out for validation")
    text_column: str = flag("text", "Column of the text")
    text_pair_column: str | None = flag(None, "Column of a second text, for pairs as in NLI")
    label_column: str = flag("label", "Column of the label: integers or strings")
    positive_label: str | None = flag(None, "Class of F1 and AUC, of two. Default: the second")
    max_length: int = flag(512, "Tokens kept of a text, if the tokenizer does not say less")
    max_train_samples: int | None = flag(None, "Train on so many examples")
    max_eval_samples: int | None = flag(None, "Evaluate on so many examples")


@dataclass
class MethodArguments:
    _argument_group_name = "R-Drop, early stopping, curves"
    rdrop_alpha: float = flag(5.0, "Weight of the KL term. 0: one pass, the plain baseline")
    length_buckets: int = flag(1, "Parts of like length, run one by one: less padding")
    early_stopping_patience: int = flag(3, "Evaluations without gain to stop after; 0: never")
    early_stopping_threshold: float = flag(0.01, "Gain that counts")
    logging_dir: str = flag("./logs_rdrop", "TensorBoard's folder, with one for each run")


RECIPE = {  # defaults that replace those of TrainingArguments; --help explains each
    # optimization
    "label_smoothing_factor": 0.1,
    "learning_rate": 2e-5,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # below 1: the share of the steps
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "num_train_epochs": 5.0,
    "seed": 42,
    # hardware
    "fp16": True,  # on CUDA, unless --bf16 is given
    "dataloader_num_workers": None,  # 2 on CUDA
    "ddp_find_unused_parameters": False,
    "ddp_broadcast_buffers": False,  # buffers must not change between the two passes
    # evaluation and checkpoints
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "restore_callback_states_from_checkpoint": True,  # resume with the patience left
    # output
    "output_dir": "./results_rdrop",
    "logging_steps": 50,
    "logging_nan_inf_filter": False,  # a loss that is not finite is shown
    "report_to": ["tensorboard"],
    "hub_strategy": "end",
}


@dataclass
class TrainingFlags(TrainingArguments):
    _argument_group_name = "training: all flags of TrainingArguments, the recipe as defaults"
    report_to: list[str] = flag("none", "Where curves go, or none")
    metric_for_best_model: Literal[METRICS] = flag("f1", "Chooses the model")


@dataclass
class RDropArguments(TrainingFlags, MethodArguments, DataArguments, ModelArguments):
    """All flags in one object. Values that cannot be had raise `ValueError`."""

    @property
    def stops_early(self) -> bool:
        return self.early_stopping_patience > 0 and self.eval_strategy != "no"

    def __post_init__(self):
        on_cuda = torch.cuda.is_available() and not self.use_cpu
        launched_as = os.environ.get("ACCELERATE_MIXED_PRECISION")  # by `accelerate launch`
        self.fp16 = self.fp16 and on_cuda and not self.bf16 and launched_as != "bf16"
        # else torch warns in every epoch
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 2 if on_cuda else 0
        super().__post_init__()
        RDropLoss(self.rdrop_alpha, self.label_smoothing_factor)  # checks the range of both
        sizes = ["per_device_train_batch_size", "per_device_eval_batch_size", "length_buckets"]
        sizes += ["gradient_accumulation_steps", "num_train_epochs", "eval_accumulation_steps"]
        for name in [*sizes, "max_length", "max_train_samples", "max_eval_samples"]:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name} must be more than 0, not {value}")
        for name in ("learning_rate", "dataloader_num_workers", "early_stopping_patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be in [0, 2 ** 32), not {self.seed}")
        if len({self.text_column, self.label_column, self.text_pair_column}) < 3:
            raise ValueError("--text_column, --label_column and --text_pair_column must differ")
        if self.validation_split == self.test_split != "none":
            raise ValueError("--validation_split and --test_split must differ")
        if (self.validation_file or self.test_file) and not self.train_file:
            raise ValueError("--validation_file and --test_file need a --train_file")
        keeps_best = self.load_best_model_at_end and self.save_strategy == "steps"
        if keeps_best and self.save_steps != self.eval_steps:
            raise ValueError("--save_steps must equal --eval_steps, to save the best model")


# A run trains and evaluates, and its metrics need all labels and logits: these flags stay as they are
FIXED = ["do_train", "do_eval", "do_predict", "prediction_loss_only", "eval_do_concat_batches"]
FIXED += ["batch_eval_metrics", "label_names", "debug", "remove_unused_columns"]
FIXED += ["dataloader_drop_last", "greater_is_better"]
RENAMED = {
    "--warmup_ratio": " is now --warmup_steps (below 1: a share)",
    "--evaluation_strategy": " is now --eval_strategy",
    "--group_by_length": " is now --train_sampling_strategy group_by_length",
    "--no_cuda": " is now --use_cpu",
}


def parse_args(argv=None) -> RDropArguments:
    """Read the command line (or `argv`, strings); a mistake in it ends the process with status 2, as argparse does."""
    groups = [ModelArguments, DataArguments, MethodArguments, TrainingFlags]
    usage = "%(prog)s [--flag value ...]   (--help lists all flags)"
    parser = HfArgumentParser(groups, allow_abbrev=False, usage=usage)
    parser.set_defaults(**RECIPE, do_train=True)
    values, unknown = parser.parse_known_args(argv)
    if unknown:  # without their values, which may be tokens
        names = [word.split("=")[0] for word in unknown if word.startswith("-")]
        names = [name + RENAMED.get(name, "") for name in names]
        parser.error(f"unknown arguments: {', '.join(names) or 'a stray word'}")
    for name in FIXED:
        if getattr(values, name) != parser.get_default(name):
            parser.error(f"--{name} cannot be had: a run trains, and evaluates all rows")
    try:
        args = RDropArguments(**vars(values))
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        parser.error(str(error))
    if args.hub_token:  # else Trainer would save it in every training_args.bin, and push it
        os.environ["HF_TOKEN"] = args.hub_token
        args.hub_token = None
    return args


# -----------------------------------------------------------------------------
# R-Drop


class RDropLoss(torch.nn.Module):
    """R-Drop with label smoothing: 1/2 (CE1 + CE2) + alpha * 1/2 (KL(p2 || p1) + KL(p1 || p2)).

    Logits are (batch, classes), labels integers (batch). The loss is a float32 scalar in nats, a mean over the batch;
    `label_smoothing` is the share of the label spread over all classes. Values out of range raise `ValueError`.
    Liang et al. (2021), section 2.1, add the CEs of the two passes: their loss with weight 2 alpha is twice this one.
    """

    def __init__(self, alpha: float = 1.0, label_smoothing: float = 0.0):
        super().__init__()
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha (--rdrop_alpha) must be finite and at least 0, not {alpha}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"smoothing (--label_smoothing_factor) must be in [0, 1), not {label_smoothing}")
        self.alpha = alpha
        self.label_smoothing = label_smoothing

    def forward(self, logits1, logits2, labels):
        ce, kl = self.terms(logits1, logits2, labels)
        return ce + self.alpha * kl

    def terms(self, logits1, logits2, labels):
        """The two terms, unweighted: the mean CE of both passes, and the mean of both KL divergences."""
        logits1, logits2 = logits1.float(), logits2.float()
        ce1 = F.cross_entropy(logits1, labels, label_smoothing=self.label_smoothing)
        ce2 = F.cross_entropy(logits2, labels, label_smoothing=self.label_smoothing)
        log_p1 = logits1.log_softmax(dim=-1)
        log_p2 = logits2.log_softmax(dim=-1)
        kl_21 = F.kl_div(log_p1, log_p2, reduction="batchmean", log_target=True)  # KL(p2 || p1)
        kl_12 = F.kl_div(log_p2, log_p1, reduction="batchmean", log_target=True)  # KL(p1 || p2)
        return 0.5 * (ce1 + ce2), 0.5 * (kl_21 + kl_12)


def split_by_length(inputs, buckets: int, multiple_of: int = 1):
    """A batch, padded on the right, in parts of like length, each cut to its longest, and the way back to its order."""
    mask = inputs["attention_mask"]
    positions = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
    lengths = (mask * positions).amax(dim=-1).cpu()  # to the last token, also where padding is on the left
    order = lengths.argsort(stable=True)
    parts = []
    for rows in order.chunk(buckets):
        width = math.ceil(lengths[rows[-1]].item() / multiple_of) * multiple_of
        parts.append({name: tensor[rows, :width] for name, tensor in inputs.items()})
    return parts, order.argsort()


class RDropTrainer(Trainer):
    """A `Trainer` whose training steps run the model twice (once if `alpha` is 0) and take `RDropLoss`.

    Label smoothing is `args.label_smoothing_factor`. With `length_buckets` above 1 a training batch is run in so many
    parts of like length, padded less; the loss stays one mean over the batch. Batches hold `labels` and, for buckets,
    `attention_mask` and tensors (batch, tokens) alone. Other arguments are `Trainer`'s; it ignores `compute_loss_func`.
    The log shows `ce` and `kl`, the terms of the training loss, as means since the last log over all processes;
    a training loss that is not finite raises `FloatingPointError` there.
    """

    loss_is_scaled_for_ga = False  # Trainer divides the mean of each micro-batch by their number

    def __init__(self, *args, alpha: float = 1.0, length_buckets: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        if length_buckets > 1 and getattr(self.processing_class, "padding_side", "right") == "left":
            raise ValueError("--length_buckets above 1 needs a tokenizer that pads on the right")
        self.length_buckets = length_buckets
        self.rdrop_loss = RDropLoss(alpha, self.args.label_smoothing_factor)
        self.sums = torch.zeros(3, device=self.args.device)  # CE, KL, steps since a log

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch with `labels`; with `return_outputs` also the logits of the first pass."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        parts, back = [inputs], slice(None)
        if model.training and self.length_buckets > 1:
            multiple_of = 1 if self.args.mixed_precision == "no" else 8
            parts, back = split_by_length(inputs, self.length_buckets, multiple_of)

        logits1 = torch.cat([model(**part).logits for part in parts])[back]
        logits2 = logits1  # the same twice: CE is that of one pass, KL is 0
        if model.training and self.rdrop_loss.alpha > 0:
            # dropout draws other masks
            logits2 = torch.cat([model(**part).logits for part in parts])[back]

        # both terms are logged: so `RDropLoss.terms`, where a change of the loss belongs, and not `forward`
        ce, kl = self.rdrop_loss.terms(logits1, logits2, labels)
        loss = ce + self.rdrop_loss.alpha * kl
        if model.training:
            # a micro-batch is its share of a step
            terms = torch.stack([ce.detach(), kl.detach(), torch.ones_like(ce)])
            self.sums += terms / getattr(self, "current_gradient_accumulation_steps", 1)
        return (loss, {"logits": logits1}) if return_outputs else loss

    def floating_point_ops(self, inputs):
        """The estimate of `Trainer`, times the passes of a training step."""
        return super().floating_point_ops(inputs) * (2 if self.rdrop_loss.alpha > 0 else 1)

    def log(self, logs, *args, **kwargs):
        """Log the two terms beside the training loss; end a training whose loss is not finite."""
        if "loss" in logs or "train_loss" in logs:
            ce, kl, steps = self.accelerator.reduce(self.sums).tolist()
            self.sums.zero_()
            if not math.isfinite(ce + kl):
                raise FloatingPointError(f"the loss is not finite (step {self.state.global_step})")
        if "loss" in logs:
            logs["ce"] = ce / steps
            if self.rdrop_loss.alpha > 0:
                logs["kl"] = kl / steps
        super().log(logs, *args, **kwargs)


# -----------------------------------------------------------------------------
# Metrics


def compute_metrics(eval_pred, positive: int = 1) -> dict[str, float]:
    """Accuracy, F1 and ROC AUC of `eval_pred`: logits (n, classes) and labels (n).

    Two classes: F1 and AUC of class `positive`. More: macro F1, and macro AUC of each class against the rest. AUC is
    left out where a class has no label. Logits that are not finite raise `FloatingPointError`.
    """
    logits, labels = torch.from_numpy(eval_pred[0]), eval_pred[1]
    if not logits.isfinite().all():
        raise FloatingPointError("the logits of the evaluation are not finite")
    predictions = logits.argmax(dim=-1).numpy()
    probabilities = logits.double().softmax(dim=-1).numpy()
    classes = probabilities.shape[-1]
    average = "binary" if classes == 2 else "macro"
    f1 = f1_score(labels, predictions, average=average, pos_label=positive, zero_division=0)
    metrics = {"accuracy": accuracy_score(labels, predictions), "f1": f1}
    if len(np.unique(labels)) == classes:
        if classes == 2:
            labels, probabilities = labels == positive, probabilities[:, positive]
        metrics["auc"] = roc_auc_score(labels, probabilities, multi_class="ovr")
    return metrics


# -----------------------------------------------------------------------------
# Data


@contextmanager
def loading(what: str, hint: str = "", errors=Exception):
    """Turn the many kinds of errors of files, libraries and the Hub into one line: what was loaded, why not, a hint."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error  # datasets wraps errors
        if isinstance(cause, UserError):
            raise cause from None
        if not isinstance(error, errors) and not isinstance(cause, errors):
            raise
        raise UserError(f"cannot load {what} ({type(cause).__name__}: {cause}). {hint}") from None


def hint_for(option: str, name: str) -> str:
    if os.path.isdir(name):
        return f"Is the folder of {option} complete?"
    mirror = f"HF_ENDPOINT, now {os.environ.get('HF_ENDPOINT')}, names a mirror"
    return f"{option} takes a local folder or a Hub id, owner/name ({mirror}). Without a Hub: tests/tiny_imdb.py"


FILE_HINT = "UTF-8? csv with commas, tsv with tabs, with a header line? json with records?"
FILE_HINT += " --text_column, --label_column, --quoting none?"
FILE_ERRORS = (OSError, ValueError, EOFError, csv.Error, zlib.error)
KINDS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def check_columns(columns, there):
    if not there:
        raise ValueError("it holds no rows")
    for name in columns.values():
        if there.count(name) != 1:
            count = "two columns" if name in there else "no column"
            raise ValueError(f"{count} {show(name)}, only {show(there)}")


def read_json_lines(file):
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
        yield record


def read_file(path, columns, separator, quoting):
    """Yield the records of a csv file (with a `separator`) or a json file as it spells them, and the lines of each."""
    open_file = gzip.open if path.lower().endswith(".gz") else open
    with open_file(path, "rt", newline="", encoding="utf-8-sig") as file:
        if separator is None:
            is_list = file.read(1000).lstrip().startswith("[")
            file.seek(0)
            records = json.load(file) if is_list else read_json_lines(file)
            yield from ((record, 1) for record in records)
            return
        csv.field_size_limit(2**31 - 1)  # the default is 2 ** 17
        quotes = csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL
        reader = csv.DictReader(file, delimiter=separator, quoting=quotes, strict=True)
        check_columns(columns, reader.fieldnames or [])
        try:
            for record in reader:
                if None in record or None in record.values():
                    raise csv.Error("more or fewer fields than the header")
                label = record[columns["label"]]
                if re.fullmatch(r"-?\d*\.\d+", label):
                    record[columns["label"]] = float(label)
                yield record, 1 + sum(str(value).count("\n") for value in record.values())
        except csv.Error as error:
            raise csv.Error(f"{os.path.basename(path)}, near line {reader.line_num}: {error}") from None


def label_name(value, feature) -> str | None:
    """The class that a label in a column of type `feature` stands for; None: there is no label."""
    if value is None or value != value:  # NaN
        return None
    if isinstance(feature, ClassLabel):
        return feature.int2str(value) if value >= 0 else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes floats where a field is empty
    if not isinstance(value, (str, int)):
        raise ValueError(f"labels are integers or strings, one a text, not {show(value)}")
    return str(value).strip() or None


def read_rows(records, columns, feature):
    """Yield each record's texts, label (none, where a text is missing), row (counted from 0) and lines."""
    seen = {}
    for number, (record, lines) in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"row {number} is no record")
        seen |= record
        row = {ours: record.get(name) for ours, name in columns.items()}
        label = label_name(row.pop("label"), feature)
        for text in row.values():
            if not isinstance(text, str | None):
                raise ValueError(f"row {number} holds {show(text)}, not text")
            if not text or not text.strip():
                label = None
        yield {**row, "label": label, "row": number, "lines": lines}
    check_columns(columns, list(seen))


def digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_split(split: str, args: DataArguments):
    """What holds `train`, `validation` or `test`, if it is there: its name, a hint, a builder, the split's name."""
    there = {"train": "train", "validation": args.validation_split, "test": args.test_split}[split]
    source, options = args.dataset_name, {"name": args.dataset_config_name}
    what, hint = f"{source}, split {there!r}", hint_for("--dataset_name", source)
    folder = os.path.abspath(source)
    if args.train_file:
        what, hint, there = getattr(args, f"{split}_file"), FILE_HINT, split
        if what is None:
            return None
        kind = Path(what.lower().removesuffix(".gz")).suffix
        if kind not in KINDS:
            raise UserError(f"{what} does not end in {', '.join(KINDS)}")
        source, options = KINDS[kind], {"data_files": {split: glob.escape(what)}}
        if kind == ".tsv":
            options["sep"] = "\t"
    elif os.path.isdir(folder) and glob.has_magic(folder):
        # `datasets` takes its name as a pattern
        options["data_dir"] = os.path.relpath(glob.escape(folder), folder)
    with loading(what, hint):
        builder = datasets.load_dataset_builder(source, **options)
    files = builder.config.data_files
    if there not in files:
        if split == "train" or there not in (split, "none"):
            raise UserError(f"{source} has no split {there!r}, only: {', '.join(map(str, files))}")
        return None
    names = show([os.path.basename(path) for path in files[there]])
    # train-00000-of-00002 is a part of train
    shards = {re.sub(r"-\d+(?=-of-\d+)", "", path) for path in files[there]}
    if os.path.isdir(source) and len(shards) > 1:
        ways = "name one file of each split by --train_file, --validation_file and --test_file"
        raise UserError(f"{source} has several files for {there}, {names}: {ways}")
    say(f"{split} is read from {names}")
    return what, hint, builder, there


def load_rows(what, hint, builder, there, args: DataArguments):
    """All rows of a split, as `read_rows` yields them, and its classes, if it declares them: read once, then cached."""
    columns = {"text": args.text_column, "text_pair": args.text_pair_column, "label": args.label_column}
    columns = {ours: column for ours, column in columns.items() if column}
    # an object each: `datasets` hashes shared ones otherwise
    types = {ours: Value("string") for ours in columns} | {"row": Value("int64"), "lines": Value("int64")}
    files, feature = list(builder.config.data_files[there]), None
    separator = getattr(builder.config, "sep", None)
    with loading(what, hint):
        if builder.info.features is None and builder.name in ("csv", "json"):
            # the library would guess types
            paths = map(str, datasets.DownloadManager().download(files))
            read = (read_file(path, columns, separator, args.quoting) for path in paths)
            records = itertools.chain.from_iterable(read)
        else:
            if os.path.exists(files[0]):  # the library's cache would go by its date
                source = builder.as_streaming_dataset(there)
            else:
                builder.download_and_prepare()
                source = builder.as_dataset(there)
            check_columns(columns, source.column_names)
            source = source.select_columns(list(columns.values()))
            feature = source.features[columns["label"]]
            records = ((record, 1) for record in source)
    with loading(what, FILE_HINT, FILE_ERRORS):  # another error is a bug of ours
        # the key of the cache holds all that decides what is read; the Hub's paths hold the commit
        contents = [digest(path) if os.path.exists(path) else path for path in [*files, __file__]]
        options = {**vars(builder.config), "name": None, "data_files": None, "data_dir": None}
        key = repr([there, columns, args.quoting, feature, options, contents])
        rows = Dataset.from_generator(
            lambda: read_rows(records, columns, feature),
            features=Features(types),
            fingerprint=hashlib.sha256(key.encode()).hexdigest(),
        )
    lines = np.array(rows["lines"][:])
    if lines.sum() > len(rows):
        found = f"{lines.sum()} lines hold {len(rows)} rows, from row {np.argmax(lines > 1)}"
        logger.warning(f"{what}: {found}: line breaks, or stray quotes? --quoting none")
    return rows, getattr(feature, "names", None)


def hold_out(rows: Dataset, fraction: float, seed: int) -> dict[str, Dataset]:
    """Draw `fraction` of each class, as `validation`, from `rows`."""
    counts = np.bincount(rows["labels"][:]).tolist()
    if 1 in counts:
        rare = show(rows.features["labels"].names[counts.index(1)])
        raise UserError(f"class {rare} has one row, too few for --validation_fraction: leave it out")
    with loading("the validation part", "Try another --validation_fraction", ValueError):
        parts = rows.train_test_split(fraction, stratify_by_column="labels", seed=seed)
    return {"train": parts["train"], "validation": parts["test"]}


def load_splits(args: DataArguments, seed: int = 42) -> DatasetDict:
    """Load, check and sub-sample `train` and, where they are there, `validation` and `test`, in this order.

    Columns are `text`, perhaps `text_pair`, `labels` (a `ClassLabel`) and `row` (in the file, counted from 0).
    """
    splits, counts = DatasetDict(), {}
    for split in ("train", "validation", "test"):
        found = find_split(split, args)
        if found is None:
            continue
        rows, declared = load_rows(*found, args)
        used = sorted(set(rows.unique("label")) - {None})
        if split == "train":
            are_integers = all(re.fullmatch(r"-?\d{1,18}", name) for name in used)
            names = declared or sorted(used, key=int if are_integers else None)
            if len(names) < 2:
                raise UserError(f"train has one label only, {show(names)}: nothing to learn")
            if args.positive_label and (args.positive_label not in names or len(names) != 2):
                raise UserError(f"--positive_label {args.positive_label!r} is not one of two: {show(names)}")
        unknown = [name for name in used if name not in names]
        if unknown:
            raise UserError(f"{split} has labels {show(unknown)}, train only {show(names)}")
        labels = rows.data.column("label")
        if labels.null_count:
            logger.warning(f"{split}: {labels.null_count} of {len(rows)} rows without text or label are left out.")
        if used:  # GLUE's test splits have no labels
            counts[split] = len(rows)
            rows = rows.select(np.flatnonzero(labels.is_valid())).cast_column("label", ClassLabel(names=names))
            splits[split] = rows.rename_column("label", "labels").remove_columns("lines")
    if args.validation_fraction:
        if "validation" in splits:
            raise UserError("a validation split is there: leave out --validation_fraction")
        splits = DatasetDict(hold_out(splits.pop("train"), args.validation_fraction, seed), **splits)
        counts["validation"] = counts["train"]
    if len(splits) == 1:
        raise UserError("no validation or test split to choose by: --validation_fraction 0.1 or --validation_split?")

    for split, rows in splits.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        if limit is not None and limit < len(rows):
            rows = splits[split] = rows.shuffle(seed=seed).take(limit)
        by_class = np.bincount(rows["labels"][:], minlength=len(names)).tolist()
        shown = show(dict(zip(names, by_class, strict=True)))
        say(f"{split}: {len(rows)} of {counts[split]} rows, {shown}")
        if 0 in by_class and split != "train":
            logger.warning(f"{split} has no row of some class: its AUC is undefined and left out.")
    return splits


def encode(*texts, tokenizer):
    """Tokenize a batch of texts, or of pairs; `cut` says which were longer than the tokenizer's limit."""
    tokens = tokenizer(*texts, truncation=True, return_length=True)
    if tokens.encodings is None:
        # a slow tokenizer does not tell: those that fill the limit
        tokens["cut"] = [length >= tokenizer.model_max_length for length in tokens["length"]]
    else:
        tokens["cut"] = [bool(encoding.overflowing) for encoding in tokens.encodings]
    return tokens


def tokenize(splits: DatasetDict, tokenizer) -> DatasetDict:
    """Replace the texts by `input_ids`, ..., `length` (at most `tokenizer.model_max_length` tokens) and `cut`."""
    texts = [column for column in ("text", "text_pair") if column in splits["train"].column_names]
    # sets its truncation, which is part of the key of the cache
    tokenizer("", truncation=True)
    options = {"batched": True, "fn_kwargs": {"tokenizer": tokenizer}, "desc": "Tokenizing"}
    splits = splits.map(encode, input_columns=texts, remove_columns=texts, **options)
    for split in splits.keys() - {"train"}:
        # longest first: little padding, out of memory at once
        longest_first = np.argsort(splits[split]["length"][:], kind="stable")[::-1]
        splits[split] = splits[split].select(longest_first)
    return splits


# -----------------------------------------------------------------------------
# Model


def load_tokenizer(args: RDropArguments):
    """The tokenizer, with the number of tokens to keep, by which pipelines will cut texts, too."""
    name = args.model_name_or_path
    with loading(name, hint_for("--model_name_or_path", name)):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer(["two", "texts"], padding=True)  # raises where there is no padding token
    if not 0 < tokenizer.model_max_length < args.max_length:
        tokenizer.model_max_length = args.max_length
    if args.max_length <= tokenizer.num_special_tokens_to_add(pair=bool(args.text_pair_column)):
        raise UserError("--max_length leaves no room beside the special tokens")
    return tokenizer


def load_model(args: ModelArguments, tokenizer, names: list[str]):
    """The encoder, in float32, with a head for the classes `names`: a new one, if it has none of this size."""
    name = args.model_name_or_path
    with loading(name, hint_for("--model_name_or_path", name)):
        # without the flag, it asks on the terminal
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if args.config_overrides:
            with loading(f"--config_overrides {args.config_overrides}", "Give key=value,..."):
                config.update_from_string(args.config_overrides)
        trained_for = list(config.id2label.values())
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
        config.problem_type = "single_label_classification"  # pipelines read it
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,  # not the checkpoint's: fp16 needs float32 weights to update
            ignore_mismatched_sizes=True,  # a head for other labels gives way to a new one
            output_loading_info=True,
            trust_remote_code=False,
        )
    new = info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}
    say(f"new weights, drawn with the seed: {show(sorted(new))}")
    if not new and trained_for != names and trained_for[0] != "LABEL_0":
        logger.warning(f"The model's head is kept: what it calls {show(trained_for)} is now {show(names)}.")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model


def dry_run(model, tokenizer, splits: DatasetDict, alpha: float):
    """Take the longest row through the model twice, as training will: fail early, and warn if both passes agree."""
    longest = [rows[int(np.argmax(rows["length"][:]))] for rows in splits.values()]
    row = max(longest, key=lambda row: row["length"])
    if not set(row["input_ids"]) - set(tokenizer.all_special_ids):
        raise UserError("the tokenizer knows no word of the longest text: are all files there?")
    inputs = {name: row[name] for name in tokenizer.model_input_names if name in row}
    batch = tokenizer.pad([inputs, inputs], return_tensors="pt")
    what = f"{row['length']} tokens into the model"
    model.train()
    with loading(what, "Try a shorter --max_length"), torch.no_grad(), torch.random.fork_rng(devices=[]):
        first, second = model(**batch).logits, model(**batch).logits
    model.eval()
    if alpha > 0 and first.equal(second):
        mend = "--config_overrides hidden_dropout_prob=0.1 (names as in its config.json)"
        logger.warning(f"The model has no dropout: both passes are equal, R-Drop only costs. Set it: {mend}")


# -----------------------------------------------------------------------------
# Checkpoints


def read_json(path: Path) -> dict:
    """What a json file holds; nothing, where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def steps(checkpoint: Path) -> int:
    """The steps that a complete checkpoint has behind it."""
    return read_json(checkpoint / "trainer_state.json")["global_step"]


def first_arguments(checkpoint: Path) -> dict:
    """The flags with which the run of a checkpoint began; nothing, where they are missing or damaged."""
    return read_json(checkpoint.resolve().with_name("arguments.json"))


def complete_checkpoints(folders, processes: int) -> list[Path]:
    """Those of `folders`, by their steps, in which all processes have saved all: Trainer would do without some."""
    complete = {}
    for folder in folders:
        state = read_json(folder / "trainer_state.json")  # written last
        saved_by = first_arguments(folder).get("world_size", processes)
        random_states = len(list(folder.glob("rng_state_*.pth")))  # one of each process
        parts = [any(folder.glob(name)) for name in ("*model*", "optimizer*", "scheduler.pt")]
        parts += [(folder / "rng_state.pth").exists() or random_states >= min(processes, saved_by)]
        if state and all(parts):
            complete[folder] = state["global_step"]
        else:
            logger.warning(f"{folder} is incomplete: it is passed over.")
    return sorted(complete, key=complete.get)


def find_checkpoint(args: RDropArguments) -> Path | None:
    """The checkpoint to resume from, if any. A new run must not find the files of another in its output folder."""
    output_dir, asked = Path(args.output_dir), args.resume_from_checkpoint
    here = complete_checkpoints(output_dir.glob("checkpoint-*"), args.world_size)
    checkpoint = None
    if asked:
        complete = here if asked == "last" else complete_checkpoints([Path(asked)], args.world_size)
        if not complete:
            raise UserError(f"nothing to resume from: no complete checkpoint ({asked})")
        if asked == "last":
            return here[-1]
        checkpoint = complete[-1].resolve()
        if checkpoint.parent == output_dir.resolve():
            later = [folder for folder in here if steps(folder) > steps(checkpoint)]
            if later:
                raise UserError(f"{later[-1]} would be overwritten: remove it, or choose another --output_dir")
            return output_dir / checkpoint.name
    for pattern in ("checkpoint-*", "*.safetensors", "*.bin", "*.json", "predictions.csv", REPORT):
        if any(output_dir.glob(pattern)):
            ways = "choose another --output_dir, or remove the folder"
            ways += ", or --resume_from_checkpoint last" if here else ""
            raise UserError(f"{output_dir} holds an earlier run or a model ({pattern}): {ways}")
    return checkpoint


def find_best(args: RDropArguments, checkpoint: Path) -> Path | None:
    """The best checkpoint so far of the run of `checkpoint`, if the best model is to be loaded at the end."""
    state = read_json(checkpoint / "trainer_state.json")
    step, metric, log = state.get("best_global_step"), f"eval_{args.metric_for_best_model}", state["log_history"]
    if step is None:
        return None
    if state["best_metric"] not in [entry.get(metric) for entry in log if entry["step"] == step]:
        raise UserError("the checkpoint's best model is by another --metric_for_best_model: resume with that")
    if not args.load_best_model_at_end:
        return None
    # both stay the checkpoint's
    if args.save_strategy == "steps" and state["save_steps"] != state["eval_steps"]:
        raise UserError("the checkpoint's run saves at other steps than it evaluates: --load_best_model_at_end false")
    name = f"checkpoint-{step}"
    was = Path(state["best_model_checkpoint"] or name)
    for folder in (checkpoint, checkpoint.with_name(name), was.with_name(name)):
        best = read_json(folder / "trainer_state.json")
        # another run may lie there by now: its log begins otherwise (compared as text, for NaN is unequal to itself)
        begins = best and str(log[: len(best["log_history"])]) == str(best["log_history"])
        if begins and best["global_step"] == step and any(folder.glob("*model*")):
            return folder
    ways = "move it back, or --load_best_model_at_end false"
    raise UserError(f"the best model so far, {name}, is missing, or was never saved: {ways}")


def check_model(model, checkpoint: Path):
    """Refuse a checkpoint of other classes or of another model, of which Trainer would load what has the same name."""
    with loading(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        with torch.device("meta"):
            saved = AutoModelForSequenceClassification.from_config(config)
    if config.id2label != model.config.id2label:
        raise UserError(f"{checkpoint} has the classes {show(config.label2id)}, the data {show(model.config.label2id)}")
    ours, theirs = ({name: weight.shape for name, weight in one.named_parameters()} for one in (model, saved))
    if ours != theirs:
        raise UserError(f"{checkpoint} is of another --model_name_or_path or --config_overrides: resume with those")


class BestCheckpoint(TrainerCallback):
    """Points `Trainer` to the best checkpoint: the path in the state that it resumes may be out of date."""

    def __init__(self, best: Path):
        self.best = best

    def on_train_begin(self, args, state, control, **kwargs):
        state.best_model_checkpoint = str(self.best)


def record_arguments(args: RDropArguments, checkpoint: Path | None):
    """Claim the output folder by `arguments.json`; on resuming, say which flags have changed since it was written."""
    arguments = json.loads(args.to_json_string())
    arguments |= {"world_size": args.world_size, "resume_from_checkpoint": None}
    if checkpoint:
        before = first_arguments(checkpoint)
        changed = [name for name in arguments if arguments[name] != before.get(name)]
        changes = [f"{name} {show(before.get(name))} -> {show(arguments[name])}" for name in changed]
        if not before:
            changes = ["unknown, for its arguments.json is missing or damaged"]
        if changes:
            kept = "learning rate, patience and steps between logs, evaluations and saves stay the checkpoint's"
            logger.warning(f"Resuming {checkpoint} with other flags ({kept}): {', '.join(changes)}")
    path = Path(args.output_dir, "arguments.json")
    with args.main_process_first(local=False):
        if args.process_index == 0 and not (checkpoint and path.exists()):
            with loading(path, "Has another run just begun there?", OSError), path.open("x") as file:
                json.dump(arguments, file, indent=2)
        if not path.exists():
            raise UserError(f"all machines must share --output_dir {args.output_dir}")


@contextmanager
def going_on(args: RDropArguments, checkpoint: Path | None):
    """Add to an error how to go on; a run that has nothing to go on from frees its output folder."""
    output_dir = Path(args.output_dir)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        print(file=sys.stderr)  # ends the line of the progress bar
        here = complete_checkpoints(output_dir.glob("checkpoint-*"), args.world_size)
        newest = here[-1] if here else checkpoint
        saved = any(output_dir.glob("*.safetensors"))
        note = f"The trained model is in {args.output_dir}." if saved else "No checkpoint is complete: start anew."
        if isinstance(error, FloatingPointError):
            note = "Start anew with a lower --learning_rate: a resumed run keeps its own."
        elif newest:
            note = f"To go on, add --resume_from_checkpoint {newest}. If it is damaged, remove it, and name another."
        error.add_note(note)
        if isinstance(error, torch.OutOfMemoryError):
            error.add_note("Halve --per_device_train_batch_size, double --gradient_accumulation_steps")
            error.add_note("(the effective batch stays), or add --activation_checkpointing.")
        if not here and not saved and args.process_index == 0:
            (output_dir / "arguments.json").unlink(missing_ok=True)
        raise


# -----------------------------------------------------------------------------
# Main


def say_start(args, trainer, checkpoint):
    """Say what a run will do."""
    say(f"device {args.device}, mixed precision: {args.mixed_precision}")
    config = trainer.model.config.to_dict()
    dropout = {key: p for key, p in config.items() if "drop" in key and isinstance(p, (int, float))}
    say(f"alpha {args.rdrop_alpha}, smoothing {args.label_smoothing_factor}, dropout {show(dropout)}")
    rows, limit = trainer.train_dataset, trainer.processing_class.model_max_length
    say(f"train: {sum(rows['length'][:])} tokens; {sum(rows['cut'][:])} texts are cut to {limit}")
    # the last three: samples of a step, batches of an epoch, steps of the run
    *_, batch, _, last_step = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    say(f"effective batch {batch}, steps {steps(checkpoint) if checkpoint else 0} to {last_step}")


def write_report(args, rows, output, positive, figures, about):
    """Show the final `figures` and what is behind them: the prediction of each row, each class, TensorBoard's tabs."""
    names = rows.features["labels"].names
    labels, predicted = output.label_ids, output.predictions.argmax(axis=-1)
    probabilities = torch.from_numpy(output.predictions).double().softmax(dim=-1).numpy()
    columns = {"row": rows["row"][:], "label": np.take(names, labels), "predicted": np.take(names, predicted)}
    columns |= {f"p_{name}": probabilities[:, i] for i, name in enumerate(names)}
    table = Dataset.from_dict(columns).to_pandas().sort_values("row")
    table.to_csv(Path(args.output_dir, "predictions.csv"), index=False)
    shown = {"labels": range(len(names)), "target_names": [show(name) for name in names]}
    by_class = classification_report(labels, predicted, digits=4, zero_division=0, **shown)
    Path(args.output_dir, REPORT).write_text(by_class, encoding="utf-8")
    what = f"F1 and AUC of {show(names[positive])}" if len(names) == 2 else "macro F1 and AUC"
    line = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    print(f"{about}: {line} ({what})")
    print(by_class if len(names) <= 20 else f"Each class: {REPORT}")
    if "tensorboard" in args.report_to:
        # of these, HPARAMS shows the first five by name, and the others by its check boxes
        settings = {"alpha": args.rdrop_alpha, "smoothing": args.label_smoothing_factor, "figures": about}
        settings |= {"learning_rate": args.learning_rate, "epochs": args.num_train_epochs, "seed": args.seed}
        settings |= {"model": args.model_name_or_path, "data": args.train_file or args.dataset_name}
        final = {f"final/{name}": value for name, value in figures.items()}
        with SummaryWriter(os.environ["TENSORBOARD_LOGGING_DIR"]) as writer:
            writer.add_hparams(settings, final, run_name=".")
            writer.add_text("final", f"```\n{by_class}\n```")
            if len(names) == 2:
                writer.add_pr_curve("final", labels == positive, probabilities[:, positive])


def finish(trainer, args, splits, positive, results):
    """Save the best model and evaluate it; all figures are added to `results`."""
    # group_by_length would shuffle the rows of evaluations
    args.train_sampling_strategy = "random"
    state = trainer.state
    best = args.load_best_model_at_end and state.best_model_checkpoint
    if best and not any(Path(best).glob("*model*")):
        raise FileNotFoundError(f"the best checkpoint, {best}, holds no model any more")
    if trainer.is_world_process_zero():
        for name in RESULTS:  # of an earlier end, perhaps of another model
            Path(args.output_dir, name).unlink(missing_ok=True)
    if not args.push_to_hub:  # which saves, too; `save_model` would push before there are figures
        trainer.save_model()
    trainer.save_metrics("train", results, combined=False)
    step = state.best_global_step if best else state.global_step
    epoch = next((log["epoch"] for log in state.log_history if log["step"] == step), state.epoch)
    model = f"best: epoch {epoch:g}, {Path(best).name}" if best else f"last: epoch {epoch:g}, step {step}"
    say(f"\n{model}, now in {args.output_dir}")
    # the first of them chose the checkpoint
    evaluated = [split for split in ("validation", "test") if split in splits]
    for prefix, split in zip(("eval", "test"), evaluated, strict=False):
        # `predict` adds no point to the curves, which show the models in training
        output = trainer.predict(splits[split], metric_key_prefix=prefix)
        metrics = {**output.metrics, "epoch": epoch}
        state.log_history.append({**metrics, "step": state.global_step})  # for the model card
        trainer.save_metrics(prefix, metrics, combined=False)
        results |= {**metrics, "epoch": results["epoch"], "best_epoch": epoch}
    trainer.save_metrics("all", results, combined=False)
    trainer.save_state()
    if trainer.is_world_process_zero():
        # of the last: test, if it is there
        figures = {name: metrics[f"{prefix}_{name}"] for name in METRICS if f"{prefix}_{name}" in metrics}
        chose = len(evaluated) == 1 and (best or args.stops_early)
        about = f"{split}, which also chose the checkpoint: optimistic" if chose else split
        write_report(args, splits[split], output, positive, figures, about)
    if args.push_to_hub:
        on_hub = None if args.train_file or os.path.isdir(args.dataset_name) else args.dataset_name
        trainer.push_to_hub(dataset=on_hub, dataset_tags=on_hub)
    # a launcher ends all with the first that ends
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    text = '{"text": "...", "text_pair": "..."}' if args.text_pair_column else '"A film to remember."'
    say(f"Model, figures, predictions: {args.output_dir}")
    if "tensorboard" in args.report_to:
        say(f"Curves: tensorboard --logdir {args.logging_dir}")
    say(f'Try it: pipeline("text-classification", {args.output_dir!r}, truncation=True)({text})')


def build_trainer(args, model, tokenizer, splits, chooser, positive, best):
    """The trainer, with curves in a folder of their own and evaluations on the split that chooses."""
    run_name = f"{Path(args.output_dir).resolve().name}_{datetime.now():%Y-%m-%d_%H-%M-%S.%f}"
    os.environ["TENSORBOARD_LOGGING_DIR"] = os.path.join(args.logging_dir, run_name)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else it warns at data loaders
    callbacks = [BestCheckpoint(best)] if best else []
    if args.stops_early:
        callbacks += [EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold)]
    in_eights = args.mixed_precision != "no" and tokenizer.model_max_length % 8 == 0
    return RDropTrainer(
        model=model,
        args=args,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if in_eights else None),
        train_dataset=splits["train"],
        eval_dataset=splits[chooser],
        processing_class=tokenizer,
        compute_metrics=lambda eval_pred: compute_metrics(eval_pred, positive),
        callbacks=callbacks,
        alpha=args.rdrop_alpha,
        length_buckets=args.length_buckets,
    )


def main(argv=None) -> dict[str, float]:
    """Train, evaluate and save as `argv` or the command line says; returns what `all_results.json` holds."""
    # older ones ignore `loss_is_scaled_for_ga`
    transformers.utils.check_min_version("5.23.0")
    args = parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and args.parallel_mode.value != "distributed":
        raise UserError("the launcher's processes find no GPU, or too few: on CPUs, add --use_cpu")
    logger.disabled = not args.should_log  # of several processes, one speaks
    transformers.utils.logging.disable_progress_bar()  # of loading and writing weights
    transformers.utils.logging.set_verbosity_error()  # without reports of loading
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # `loading` says it once
    checkpoint = find_checkpoint(args)
    best = find_best(args, checkpoint) if checkpoint else None
    for folder in (args.output_dir, args.logging_dir):
        with loading(folder, "It must be a folder, or not there", OSError):
            Path(folder).mkdir(parents=True, exist_ok=True)

    transformers.set_seed(args.seed)  # before the new head is drawn
    tokenizer = load_tokenizer(args)
    with args.main_process_first():  # the others find the result in the cache
        splits = load_splits(args, args.seed)
    names = splits["train"].features["labels"].names
    positive = names.index(args.positive_label or names[1])
    chooser = "validation" if "validation" in splits else "test"
    if args.metric_for_best_model == "auc" and len(splits[chooser].unique("labels")) < len(names):
        raise UserError("--metric_for_best_model auc is undefined: the split lacks a class")
    model = load_model(args, tokenizer, names)
    if checkpoint:
        check_model(model, checkpoint)
    with args.main_process_first():
        splits = tokenize(splits, tokenizer)
    dry_run(model, tokenizer, splits, args.rdrop_alpha)
    with loading("what the flags ask for", "", (ValueError, ImportError, OSError, RuntimeError)):
        trainer = build_trainer(args, model, tokenizer, splits, chooser, positive, best)
        say_start(args, trainer, checkpoint)

    record_arguments(args, checkpoint)
    with going_on(args, checkpoint):
        results = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
        if checkpoint:
            results.pop("train_loss")  # of the steps since, of which there may be none
        results["epoch"] = trainer.state.epoch
        finish(trainer, args, splits, positive, results)
    return results


if __name__ == "__main__":
    # imports leave objects whose __del__ would swallow a Ctrl-C, when Trainer begins with a gc.collect
    gc.freeze()
    try:
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes, one speaks
            line = "".join(filter(str.isprintable, " ".join(str(error).split())))
            print(f"train_rdrop.py: error: {line[:1000]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print("train_rdrop.py: interrupted.", *getattr(error, "__notes__", []), file=sys.stderr)
        sys.exit(130)
