"""Fine-tune RoBERTa (or any encoder) for text classification with R-Drop and label smoothing.

    python train_rdrop.py       # the published recipe: roberta-base on IMDB
    python train_rdrop.py --train_file reviews.csv --validation_fraction 0.1 --output_dir results_mine
    torchrun --nproc_per_node 2 train_rdrop.py --per_device_train_batch_size 8
    tensorboard --logdir logs_rdrop

R-Drop (Liang et al., NeurIPS 2021, arXiv 2106.14448) passes each batch through the model twice, with different dropout
masks, and adds a symmetric KL term that pulls the two predictions together:

    loss = 1/2 (CE(z1, y) + CE(z2, y)) + alpha * 1/2 (KL(p2 || p1) + KL(p1 || p2)),    p = softmax(z)

Contents: R-Drop, metrics, messages, arguments, data, model, runs, report, main.
"""

import csv
import glob
import gzip
import json
import math
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from reprlib import repr as short
from typing import Literal

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from sklearn.metrics import accuracy_score, classification_report, f1_score, roc_auc_score
from torch.utils.tensorboard import SummaryWriter

logger = get_logger("train_rdrop")  # logs on the main process only


# --------
# R-Drop


class RDropLoss(torch.nn.Module):
    """R-Drop with label smoothing: 1/2 (CE1 + CE2) + alpha * 1/2 (KL(p2 || p1) + KL(p1 || p2)).

    Logits have shape (batch, classes), labels are integers of shape (batch). The loss is a float32 scalar in nats, a
    mean over the batch; `label_smoothing` is the share of the label that is spread over all classes. Values out of
    range raise `ValueError`. The paper (Liang et al., 2021, section 2.1) sums the CEs, so its alpha is twice ours.
    """

    def __init__(self, alpha: float = 1.0, label_smoothing: float = 0.0):
        super().__init__()
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha (--rdrop_alpha) must be finite and at least 0, got {alpha}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"smoothing (--label_smoothing_factor) must be in [0, 1), got {label_smoothing}")
        self.alpha = alpha
        self.label_smoothing = label_smoothing

    def forward(self, logits1, logits2, labels):
        ce, kl = self.terms(logits1, logits2, labels)
        return ce + self.alpha * kl

    def terms(self, logits1, logits2, labels):
        """The two terms, unweighted: the mean CE of both passes, and the mean of both KL divergences."""
        logits1, logits2 = logits1.float(), logits2.float()
        ce1, ce2 = (F.cross_entropy(z, labels, label_smoothing=self.label_smoothing) for z in (logits1, logits2))
        log_p1 = logits1.log_softmax(dim=-1)
        log_p2 = logits2.log_softmax(dim=-1)
        kl_21 = F.kl_div(log_p1, log_p2, reduction="batchmean", log_target=True)  # KL(p2 || p1)
        kl_12 = F.kl_div(log_p2, log_p1, reduction="batchmean", log_target=True)  # KL(p1 || p2)
        return 0.5 * (ce1 + ce2), 0.5 * (kl_21 + kl_12)


def split_by_length(inputs, buckets: int, multiple_of: int = 1):
    """Split a right-padded batch into groups of similar length, each trimmed to its longest row.

    Also returns the permutation that restores the order of the batch.
    """
    mask = inputs["attention_mask"]
    lengths = (mask * torch.arange(1, mask.shape[-1] + 1, device=mask.device)).amax(dim=-1).cpu()
    by_length = lengths.argsort(stable=True)
    groups = []
    for rows in by_length.chunk(buckets):
        width = math.ceil(lengths[rows[-1]].item() / multiple_of) * multiple_of
        groups.append({name: tensor[rows, :width] for name, tensor in inputs.items()})
    return groups, by_length.argsort()


class RDropTrainer(transformers.Trainer):
    """A `Trainer` whose training steps run the model twice (once if `alpha` is 0) and minimize `RDropLoss`.

    Label smoothing is `args.label_smoothing_factor`. With `length_buckets` above 1, each pass runs the batch in groups
    of similar length, which saves padding; the loss is still one mean over the batch. The log shows `ce` and `kl`, its
    terms, as means over steps and processes. A loss that is not finite raises `FloatingPointError` when logged.
    """

    # `Trainer` then divides the mean of each micro-batch by their number
    loss_is_scaled_for_ga = False

    def __init__(self, *args, alpha: float = 1.0, length_buckets: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.length_buckets = length_buckets
        self.rdrop_loss = RDropLoss(alpha, self.args.label_smoothing_factor)
        # CE, KL and steps, summed since the last log
        self.sums = torch.zeros(3, device=self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch with `labels`; with `return_outputs` also the logits of the first pass."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        groups, restore_order = [inputs], slice(None)
        if model.training and self.length_buckets > 1:
            multiple_of = 1 if self.args.mixed_precision == "no" else 8
            groups, restore_order = split_by_length(inputs, self.length_buckets, multiple_of)

        logits1 = torch.cat([model(**group).logits for group in groups])[restore_order]
        logits2 = logits1  # a single pass: its CE, and a KL of 0
        if model.training and self.rdrop_loss.alpha > 0:
            # the second pass, with new dropout masks
            logits2 = torch.cat([model(**group).logits for group in groups])[restore_order]

        ce, kl = self.rdrop_loss.terms(logits1, logits2, labels)
        loss = ce + self.rdrop_loss.alpha * kl
        if model.training:
            terms = torch.stack([ce.detach(), kl.detach(), torch.ones_like(ce)])
            self.sums += terms / getattr(self, "current_gradient_accumulation_steps", 1)
        return (loss, {"logits": logits1}) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs or "train_loss" in logs:
            ce, kl, steps = self.accelerator.reduce(self.sums).tolist()
            self.sums.zero_()
            if not math.isfinite(ce + kl):
                raise FloatingPointError(f"the training loss is not finite at step {self.state.global_step}")
        if "loss" in logs:
            logs |= {"ce": ce / steps, "kl": kl / steps}
        super().log(logs, *args, **kwargs)


# --------
# Metrics


METRICS = ("accuracy", "f1", "auc", "loss")


def compute_metrics(eval_pred, positive: int = 1, label_smoothing: float = 0.0) -> dict[str, float]:
    """Accuracy, F1, ROC AUC and CE from `eval_pred`: logits (n, classes) and labels (n).

    With two classes, F1 and AUC are those of class `positive`. With more, F1 is the mean over the classes that have
    labels, and AUC the mean of each class against the rest. AUC is omitted where a class has no label.
    """
    logits, labels = torch.from_numpy(eval_pred[0]), eval_pred[1]
    predictions = logits.argmax(dim=-1).numpy()
    probabilities = logits.double().softmax(dim=-1).numpy()
    present, classes = np.unique(labels), logits.shape[-1]
    scored = [positive] if classes == 2 else present
    f1 = f1_score(labels, predictions, labels=scored, average="macro", zero_division=0)
    metrics = {"accuracy": accuracy_score(labels, predictions), "f1": f1}
    # `Trainer`'s is inexact with several processes
    metrics["loss"] = F.cross_entropy(logits, torch.from_numpy(labels), label_smoothing=label_smoothing).item()
    if len(present) == classes:
        if classes == 2:
            labels, probabilities = labels == positive, probabilities[:, positive]
        metrics["auc"] = roc_auc_score(labels, probabilities, multi_class="ovr")
    return metrics


# --------
# Messages


class UserError(Exception):
    """Invalid input, reported as one line without a traceback."""


@contextmanager
def readable_errors(action: str):
    """Report an error of a file, a library or the Hub as one line that begins with `action`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        raise UserError(f"{action}: {type(cause).__name__}: {cause}") from error


# --------
# Arguments


def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class OwnArguments:
    """What is learned, from which data, and how. A resumed run must share all of these."""

    # method
    rdrop_alpha: float = flag(5.0, "Weight of the KL term; 0: one forward pass, the baseline")
    length_buckets: int = flag(1, "Length groups per batch, to save padding; 1: off")
    early_stopping_patience: int = flag(3, "Stop after this many evaluations without gain; 0: off")
    early_stopping_threshold: float = flag(0.01, "Smallest gain that counts")
    # model
    model_name_or_path: str = flag("FacebookAI/roberta-base", "Model on the Hub or local folder")
    config_overrides: str | None = flag(None, "Model config: hidden_dropout_prob=0.2,...")
    max_length: int = flag(512, "Maximum length in tokens")
    # data
    dataset_name: str = flag("stanfordnlp/imdb", "Dataset on the Hub or local folder")
    dataset_config_name: str | None = flag(None, "Configuration of the dataset")
    train_file: str | None = flag(None, "Training csv, json, ..., replaces the dataset")
    validation_file: str | None = flag(None, "Validation file; selects the checkpoint")
    test_file: str | None = flag(None, "Test file; evaluated once, at the end")
    quoting: Literal["minimal", "none"] = flag("minimal", "csv: none keeps quotes as text")
    validation_split: str = flag("validation", "Split that selects the checkpoint, or none")
    test_split: str = flag("test", "Split evaluated at the end, or none")
    validation_fraction: float = flag(0.0, "Fraction of train held out for validation")
    text_column: str = flag("text", "Column with the text")
    text_pair_column: str | None = flag(None, "Column with a second text, as in NLI")
    label_column: str = flag("label", "Column with the label")
    positive_label: str | None = flag(None, "Positive class of two; None: the second")
    max_train_samples: int | None = flag(None, "Maximum number of training rows")
    max_eval_samples: int | None = flag(None, "Maximum rows per evaluation split")


UNSUPPORTED = ("do_train", "dataloader_drop_last", "prediction_loss_only", "label_names", "eval_do_concat_batches")


@dataclass
class RDropArguments(transformers.TrainingArguments, OwnArguments):
    """Our arguments and `TrainingArguments` with the recipe's defaults. Wrong values raise `ValueError`."""

    output_dir: str = flag("./results_rdrop", "Checkpoints, final model and metrics")
    logging_dir: str = flag("./logs_rdrop", "TensorBoard logs, one subfolder per run")
    report_to: str = flag("tensorboard", "Logger (tensorboard, wandb, ...), or none")
    do_train: bool = flag(True, "Always on; so is evaluation")
    # optimization
    label_smoothing_factor: float = flag(0.1, "Label smoothing of the cross-entropy")
    learning_rate: float = flag(2e-5, "Peak learning rate of AdamW")
    weight_decay: float = flag(0.01, "Weight decay of AdamW")
    lr_scheduler_type: str = flag("cosine", "Learning rate schedule")
    warmup_steps: float = flag(0.1, "Warmup steps; below 1: a fraction")
    per_device_train_batch_size: int = flag(16, "Training batch size per device")
    per_device_eval_batch_size: int = flag(16, "Evaluation batch size per device")
    num_train_epochs: float = flag(5.0, "Number of epochs")
    # hardware
    fp16: bool = flag(True, "fp16 mixed precision on CUDA, unless --bf16")
    dataloader_pin_memory: bool = flag(torch.cuda.is_available(), "Pin memory")
    dataloader_num_workers: int = flag(2 if torch.cuda.is_available() else 0, "Workers per data loader")
    ddp_find_unused_parameters: bool = flag(False, "DDP: allow unused parameters")
    ddp_broadcast_buffers: bool = flag(False, "DDP: resend buffers in each pass")
    # evaluation and checkpoints
    eval_strategy: str = flag("epoch", "When to evaluate: no, steps or epoch")
    save_strategy: str = flag("epoch", "When to save: no, steps, epoch or best")
    save_total_limit: int = flag(2, "Number of checkpoints to keep")
    load_best_model_at_end: bool = flag(True, "Keep the best model, not the last")
    metric_for_best_model: Literal[METRICS] = flag("f1", "Metric that selects the checkpoint")
    restore_callback_states_from_checkpoint: bool = flag(True, "Resume early stopping")
    logging_steps: float = flag(50, "Steps between training logs")
    hub_strategy: str = flag("end", "When to push to the Hub")

    def __post_init__(self):
        self.fp16 = self.fp16 and not self.bf16 and torch.cuda.is_available() and not self.use_cpu
        RDropLoss(self.rdrop_alpha, self.label_smoothing_factor)  # checks their ranges
        for name in UNSUPPORTED:
            if getattr(self, name) != getattr(RDropArguments, name):
                raise ValueError(f"--{name} {getattr(self, name)} is not supported")
        for name in ("length_buckets", "max_length", "max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.validation_split == self.test_split != "none":
            raise ValueError("--validation_split and --test_split must differ")
        by_steps = self.load_best_model_at_end and self.eval_strategy == self.save_strategy == "steps"
        if by_steps and self.save_steps != (self.eval_steps or self.logging_steps):
            raise ValueError("--save_steps must equal --eval_steps, so that the best model is saved")
        super().__post_init__()
        if self.hub_token:  # it would be saved with every checkpoint
            os.environ["HF_TOKEN"], self.hub_token = self.hub_token, None


def parse_args(argv=None) -> RDropArguments:
    """Arguments from `argv` or the command line. Mistakes end the process with status 2, as in argparse."""
    parser = transformers.HfArgumentParser(RDropArguments, allow_abbrev=False, usage="%(prog)s [--flag value ...]")
    try:
        args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    if unknown:  # named without their values, which may be tokens
        names = [word.split("=")[0] for word in unknown if word.startswith("-")]
        parser.error(f"unrecognized arguments: {', '.join(names) or 'value without a flag'}")
    return args


# --------
# Data: rows with `text`, perhaps `text_pair`, `label` (the name of a class, or None) and `row`

HINT = "If quotes are ordinary text in this file, add --quoting none."
KINDS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def find_builder(split: str, args: OwnArguments):
    """The `datasets` builder of a split (None if there is no such split), and the split's name in it."""
    file = getattr(args, f"{split}_file")
    name = {"train": "train", "validation": args.validation_split, "test": args.test_split}[split]
    source, options = args.dataset_name, {"name": args.dataset_config_name}
    if file:
        source, options = KINDS.get(Path(file.removesuffix(".gz")).suffix), {"data_files": {name: glob.escape(file)}}
        if not source:
            raise UserError(f"{file} does not end in one of {list(KINDS)}")
    elif args.train_file:
        return None, name
    # the user's cache may contain guessed types
    with tempfile.TemporaryDirectory() as empty:
        builder = datasets.load_dataset_builder(source, **options, cache_dir=empty)
    found = builder.config.data_files
    if name not in found and (split == "train" or name not in (split, "none")):
        raise UserError(f"{source} has no split {name!r}, only {list(found)}")
    return builder if name in found else None, name


def load_rows(builder, name: str, args: OwnArguments) -> tuple[Dataset, list[str]]:
    """All rows of the split `name`, and the classes that it declares."""
    files = list(builder.config.data_files[name])
    shown = ", ".join(map(os.path.basename, files))
    PartialState().print(f"reading {shown}")
    # shards such as train-00000-of-00002 are one file
    if os.path.exists(files[0]) and len({re.sub(r"-\d+-of-\d+", "", file) for file in files}) > 1:
        raise UserError(f"several files for {name}: {shown}. Select one with --{name}_file")

    columns = {"text": args.text_column, "text_pair": args.text_pair_column, "label": args.label_column}
    columns = {ours: theirs for ours, theirs in columns.items() if theirs}
    features = Features({ours: Value("string") for ours in columns} | {"lines": Value("int64")})
    parts, names = [], []
    for path, file in zip(datasets.DownloadManager().download(files), files, strict=True):
        # copies may keep the modification time
        changed = f"{os.path.getmtime(path)}-{os.path.getctime(path)}"
        # as declared by the dataset's card
        feature = (builder.info.features or {}).get(args.label_column)
        # the library would guess types
        if builder.name in ("csv", "json"):
            separator = "\t" if ".tsv" in os.path.basename(file) else getattr(builder.config, "sep", None)
            options = {
                "path": path,
                "changed": changed,
                "gzipped": file.endswith(".gz"),
                "separator": separator,
                "quoting": args.quoting,
                "columns": columns,
                "feature": feature,
            }
            rows = Dataset.from_generator(read_rows, features=features, gen_kwargs=options)
        else:
            table = datasets.load_dataset(builder.name, changed, data_files=glob.escape(path), split="train")
            check_columns(columns, table.column_names)
            # files may declare different classes
            own = table.features[args.label_column]
            feature = own if isinstance(own, ClassLabel) else feature
            options = {"fn_kwargs": {"columns": columns, "feature": feature}, "features": features}
            rows = table.map(our_columns, remove_columns=table.column_names, **options)
        parts.append(rows)
        names += getattr(feature, "names", [])
    rows = datasets.concatenate_datasets(parts)
    lines = rows["lines"][:]
    if builder.name == "csv" and sum(lines) > len(rows):
        logger.warning(f"{shown}: texts have line breaks, {sum(lines)} lines are {len(rows)} rows. {HINT}")
    return rows.remove_columns("lines").add_column("row", np.arange(len(rows))), list(dict.fromkeys(names))


def read_rows(path, changed, gzipped, separator, quoting, columns, feature):
    """Yield the rows of a csv (with a `separator`) or json file as spelled; `changed` is for the cache alone."""
    with (gzip.open if gzipped else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        if separator:
            csv.field_size_limit(2**31 - 1)
            rule = csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL
            records = csv.DictReader(file, delimiter=separator, quoting=rule, strict=True)
        else:
            is_list = file.read(1) == "["
            file.seek(0)
            records = json.load(file) if is_list else map(json.loads, filter(str.strip, file))
        found = {}
        try:
            for record in records:
                if separator and (None in record or None in record.values() or len(record) < len(records.fieldnames)):
                    raise csv.Error("the fields do not match the header, or columns share a name")
                found |= record
                yield our_columns(record, columns, feature)
        except csv.Error as error:
            raise ValueError(f"line {records.line_num}: {error}. {HINT if quoting != 'none' else ''}") from None
    check_columns(columns, list(found))


def our_columns(record: dict, columns: dict, feature=None) -> dict:
    """A record in our columns. Without a text, the label is None, too; load_splits drops the row."""
    ours = {name: record.get(theirs) for name, theirs in columns.items()}
    label = label_name(ours.pop("label"), feature)
    complete = all(text and text.strip() for text in ours.values())
    lines = 1 + sum(len(re.findall(r"\r\n?|\n", str(value))) for value in record.values())
    return {**ours, "label": label if complete else None, "lines": lines}


def label_name(value, feature=None) -> str | None:
    """The class that a label stands for; None if the label is missing."""
    value = value.strip() if isinstance(value, str) else value
    if value is None or value == "" or value != value:  # NaN is unequal to itself
        return None
    if isinstance(feature, ClassLabel):
        index = feature.str2int(value) if isinstance(value, str) else value
        return feature.int2str(index) if index >= 0 else None
    if not isinstance(value, (str, int)) and not (isinstance(value, float) and value.is_integer()):
        raise ValueError(f"labels must be integers or strings, got {short(value)}")
    # pandas writes 1 as 1.0 beside an empty field
    return re.sub(r"^([-+]?\d+)\.0$", r"\1", str(value))


def check_columns(columns: dict, found: list[str]):
    for column in columns.values():
        if column not in found:
            raise ValueError(f"column {column!r} not found; available: {found}")


def load_splits(args: OwnArguments, seed: int = 42) -> DatasetDict:
    """`train` and, where they exist, `validation` and `test`, with texts, `labels` (a `ClassLabel`) and `row`."""
    splits, names = DatasetDict(), []
    for split in ("train", "validation", "test"):
        with readable_errors(f"cannot load {getattr(args, f'{split}_file') or args.dataset_name}"):
            builder, name = find_builder(split, args)
            if builder is None:
                continue
            rows, declared = load_rows(builder, name, args)
        complete = rows.filter(lambda label: label is not None, input_columns="label")
        if len(complete) < len(rows):
            logger.warning(f"{split}: dropped {len(rows) - len(complete)} of {len(rows)} rows, without text or label")
        found = sorted(complete.unique("label"))
        if split == "train":
            integers = all(re.fullmatch(r"[-+]?\d{1,18}", name) for name in found)
            names = declared or sorted(found, key=int if integers else None)
            if len(found) < 2:
                raise UserError(f"the training data has fewer than two classes: {found}")
        if unknown := [name for name in found if name not in names]:
            raise UserError(f"{split} has labels that train lacks: {short(unknown)}")
        if found:  # the test splits of GLUE have no labels
            splits[split] = complete.cast_column("label", ClassLabel(names=names)).rename_column("label", "labels")

    if args.validation_fraction:
        if "validation" in splits:
            raise UserError("--validation_fraction: the data already has a validation split")
        with readable_errors("wrong --validation_fraction"):
            held = splits["train"].train_test_split(args.validation_fraction, stratify_by_column="labels", seed=seed)
        splits["train"], splits["validation"] = held["train"], held["test"]
    if len(splits) == 1:
        raise UserError("no validation or test data: add --validation_fraction 0.1")
    for split, rows in splits.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        if limit and limit < len(rows):
            splits[split] = rows.shuffle(seed=seed).take(limit)
    return splits


def count_rows(splits: DatasetDict) -> dict[str, dict]:
    """Print and return the number of rows per class in each split."""
    counts = {}
    for split, rows in splits.items():
        labels, names = rows["labels"][:], rows.features["labels"].names
        counts[split] = {name: labels.count(i) for i, name in enumerate(names)}
        PartialState().print(f"{split}: {len(rows)} rows, {counts[split]}")
    return counts


def tokenize(splits: DatasetDict, tokenizer) -> DatasetDict:
    """Replace the texts by `input_ids`, ..., and `length`. Evaluation splits are sorted, longest first."""
    texts = [column for column in ("text", "text_pair") if column in splits["train"].column_names]
    # truncation is part of the tokenizer's state, which `map` hashes
    tokenizer("", truncation=True)
    options = {"batched": True, "fn_kwargs": {"truncation": True, "return_length": True}, "desc": "Tokenizing"}
    splits = splits.map(tokenizer, input_columns=texts, remove_columns=texts, **options)
    for split in splits.keys() - {"train"}:
        # longest first, which saves padding
        order = np.argsort(splits[split]["length"][:], kind="stable")[::-1]
        splits[split] = splits[split].select(order)
    return splits


# --------
# Model


def load_tokenizer(args: OwnArguments):
    """The tokenizer; its `model_max_length` is saved, so that pipelines truncate in the same way."""
    with readable_errors(f"cannot load the tokenizer of {args.model_name_or_path}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    tokenizer.model_max_length = min(args.max_length, tokenizer.model_max_length)
    return tokenizer


def load_model(args: OwnArguments, names: list[str]):
    """The encoder in float32 with a head for the classes `names`, which is new unless its own fits."""
    with readable_errors(f"cannot load the model {args.model_name_or_path}"):
        config = transformers.AutoConfig.from_pretrained(args.model_name_or_path, trust_remote_code=False)
        if args.config_overrides:
            config.update_from_string(args.config_overrides)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
        config.problem_type = "single_label_classification"  # pipelines read it
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            args.model_name_or_path,
            config=config,
            dtype=torch.float32,  # fp16 training needs float32 weights
            ignore_mismatched_sizes=True,  # a head for different classes is replaced by a new one
            trust_remote_code=False,
        )


def check_passes(model, tokenizer, splits: DatasetDict, alpha: float):
    """Run the longest text through the model twice: it must fit, and dropout must make a difference."""
    rows = datasets.concatenate_datasets(list(splits.values()))
    row = rows[int(np.argmax(rows["length"][:]))]
    inputs = {name: row[name] for name in tokenizer.model_input_names if name in row}
    model.train()
    if not set(row["input_ids"]) - set(tokenizer.all_special_ids):
        raise UserError("the tokenizer leaves no words of the longest text")
    with readable_errors(f"trial run on {row['length']} tokens, at most --max_length"):
        batch = tokenizer.pad([inputs, inputs], return_tensors="pt")
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            first, second = model(**batch).logits, model(**batch).logits
    if alpha > 0 and first.equal(second):
        logger.warning("both passes are equal, so R-Drop has no effect; set dropout with --config_overrides")


# --------
# Runs: one per output folder; its own command resumes it


# what a resumed run must share
FIXED = {own.name for own in fields(OwnArguments)} | {"seed", "batch_size", "rows"}
FIXED.update(["metric_for_best_model", "label_smoothing_factor", "learning_rate", "weight_decay"])


def read_json(path: Path) -> dict:
    """A JSON file, or {} if it is missing or unreadable."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def complete_checkpoints(output_dir: str, world_size: int) -> list[Path]:
    """Checkpoints that all processes saved completely, oldest first. `Trainer` ignores some missing files."""
    world_size = read_json(Path(output_dir, "arguments.json")).get("world_size", world_size)
    random_states = {f"rng_state_{i}.pth" for i in range(world_size)}
    complete = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        # `trainer_state.json` is written last, by the main process
        state, files = read_json(folder / "trainer_state.json"), set(os.listdir(folder))
        resumable = {"optimizer.pt", "scheduler.pt"} < files and any("model" in file for file in files)
        if state and resumable and ("rng_state.pth" in files or random_states < files):
            complete[folder] = state["global_step"]
        else:
            logger.warning(f"skipping incomplete {folder}")
    return sorted(complete, key=complete.get)


def find_checkpoint(args: RDropArguments) -> Path | None:
    """The checkpoint to resume from, if asked. Refuses an output folder that contains another run."""
    folder, asked = Path(args.output_dir), args.resume_from_checkpoint
    if not asked:
        results = ("checkpoint-*", "*.safetensors", "*.bin", "*.json", "predictions.csv", "*report.txt")
        if found := [path.name for pattern in results for path in folder.glob(pattern)]:
            raise UserError(f"{folder} has {found[0]}: add --resume_from_checkpoint last, or use another")
        return None
    newest = (complete_checkpoints(args.output_dir, args.world_size) or [None])[-1]
    if newest is None or (asked != "last" and Path(asked).resolve() != newest.resolve()):
        raise UserError(f"cannot resume from {asked}: the newest complete checkpoint of {folder} is {newest}")
    best = read_json(newest / "trainer_state.json")["best_global_step"]
    if best and args.load_best_model_at_end and not (folder / f"checkpoint-{best}").exists():
        raise UserError(f"the best model, checkpoint-{best}, is missing in {folder}")
    return newest


def check_settings(args: RDropArguments, settings: dict):
    """Refuse to resume a run with settings or data that change it; warn of other changes."""
    before = read_json(Path(args.output_dir, "arguments.json"))
    changes = {name: (before[name], now) for name, now in settings.items() if before.get(name, now) != now}
    if refused := {name: values for name, values in changes.items() if name in FIXED}:
        raise UserError(f"the run began with different settings (then, now): {refused}")
    if changes:
        logger.warning(f"resuming with different flags (then, now): {changes}")


class BestCheckpoint(transformers.TrainerCallback):
    """Finds the best checkpoint of a resumed run in its output folder, which may have been moved."""

    def on_train_begin(self, args, state, control, **kwargs):
        best = os.path.join(args.output_dir, f"checkpoint-{state.best_global_step}")
        state.best_model_checkpoint = best if os.path.isdir(best) else None


def train(trainer: RDropTrainer, checkpoint: Path | None, settings: dict) -> dict:
    """Train, from `checkpoint` if given; a run that had ended is not trained any further, and keeps its figures.

    `arguments.json` claims the output folder; a run that fails before its first checkpoint frees it.
    """
    args, step = trainer.args, 0
    plan = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    _, steps_per_epoch, _, _, batch_size, _, last_step = plan
    planned = args.num_train_epochs, args.max_steps
    if checkpoint:
        state = read_json(checkpoint / "trainer_state.json")
        step = state["global_step"]
        stopped = state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
        if step >= last_step or (stopped and step < state["max_steps"]):
            # it had ended, or stopped early: plan no epoch beyond those done
            args.num_train_epochs, args.max_steps = step // steps_per_epoch, -1
    PartialState().print(f"{args.device}, precision {args.mixed_precision}, batch size {batch_size}, {last_step} steps")

    claim = Path(args.output_dir, "arguments.json")
    if args.process_index == 0 and not checkpoint:
        with readable_errors("another run may use the folder"), claim.open("x") as file:
            json.dump(settings, file, indent=2)
    try:
        results = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
    except (Exception, KeyboardInterrupt):
        if args.process_index == 0 and not checkpoint and not list(claim.parent.glob("checkpoint-*")):
            claim.unlink(missing_ok=True)
        raise
    args.num_train_epochs, args.max_steps = planned
    if checkpoint:
        del results["train_loss"]  # covers only the steps since then
    before = read_json(claim.with_name("train_results.json"))
    return before if before.get("epoch") == results["epoch"] else results


# --------
# Report


def write_report(args, rows: Dataset, output, positive: int, figures: dict, about: str):
    """Write predictions.csv, the report per class and TensorBoard's final metrics."""
    names = rows.features["labels"].names
    labels, predicted = output.label_ids, output.predictions.argmax(axis=-1)
    probabilities = torch.from_numpy(output.predictions).double().softmax(dim=-1).numpy()
    columns = {"row": rows["row"][:], "label": np.take(names, labels), "predicted": np.take(names, predicted)}
    columns |= {f"p_{name}": probabilities[:, i] for i, name in enumerate(names)}
    Dataset.from_dict(columns).to_pandas().sort_values("row").to_csv(f"{args.output_dir}/predictions.csv", index=False)
    present = np.unique(labels)  # as in `compute_metrics`
    report = classification_report(labels, predicted, labels=present, target_names=np.take(names, present), digits=4)
    Path(args.output_dir, "classification_report.txt").write_text(report, encoding="utf-8")
    print(f"{about}: {', '.join(f'{name} {value:.4f}' for name, value in figures.items())}\n{report}")
    if "tensorboard" in args.report_to:
        settings = {name: value for name, value in args.to_sanitized_dict().items() if name in FIXED}
        with SummaryWriter(os.environ["TENSORBOARD_LOGGING_DIR"]) as writer:
            writer.add_hparams(settings, {f"final/{name}": value for name, value in figures.items()}, run_name=".")
            writer.add_text("final", f"{about}\n```\n{report}\n```")
            if len(names) == 2:
                writer.add_pr_curve("final", labels == positive, probabilities[:, positive])


def finish(trainer: RDropTrainer, splits: DatasetDict, positive: int, results: dict) -> dict:
    """Save the model, evaluate it and write all metrics; push them to the Hub if asked."""
    args, state = trainer.args, trainer.state
    best = args.load_best_model_at_end and state.best_model_checkpoint
    step = state.best_global_step if best else state.global_step
    epoch = next((log["epoch"] for log in state.log_history if log["step"] == step), state.epoch)
    trainer.save_metrics("train", results, combined=False)
    if not args.push_to_hub:  # `push_to_hub` saves, too
        trainer.save_model()
    args.train_sampling_strategy = "random"  # group_by_length would shuffle the predictions
    evaluated = [split for split in ("validation", "test") if split in splits]
    # the first selected the checkpoint, the last is reported
    for prefix, split in zip(("eval", "test"), evaluated, strict=False):
        output = trainer.predict(splits[split], metric_key_prefix=prefix)
        metrics = output.metrics | {"best_epoch": epoch}
        trainer.save_metrics(prefix, metrics, combined=False)
        # for the model card
        state.log_history.append(metrics | {"epoch": epoch, "step": step})
        results |= metrics
    trainer.save_metrics("all", results, combined=False)
    trainer.save_state()
    if trainer.is_world_process_zero():
        figures = {name: metrics[key] for name in METRICS if (key := f"{prefix}_{name}") in metrics}
        optimistic = len(evaluated) == 1 and args.eval_strategy != "no" and (best or args.early_stopping_patience > 0)
        about = f"{split}, {'best' if best else 'last'} model (epoch {epoch:g})"
        about += "; optimistic, as it also selected the checkpoint" if optimistic else ""
        write_report(args, splits[split], output, positive, figures, about)
    if args.push_to_hub:
        local = args.train_file or os.path.isdir(args.dataset_name)
        trainer.push_to_hub(dataset_tags=None if local else args.dataset_name)
    trainer.accelerator.wait_for_everyone()  # before the process group ends
    trainer.end()
    PartialState().print(f"Results: {args.output_dir}. Curves: tensorboard --logdir {args.logging_dir}")
    return results


# --------
# Main


def main(argv=None) -> dict[str, float]:
    """Train, evaluate and save as `argv` or the command line says; returns what `all_results.json` contains."""
    transformers.utils.check_min_version("5.23.0")  # older ones ignore `loss_is_scaled_for_ga`
    args = parse_args(argv)
    checkpoint = find_checkpoint(args)
    run_name = f"{Path(args.output_dir).resolve().name}_{datetime.now():%Y%m%d-%H%M%S.%f}"
    os.environ["TENSORBOARD_LOGGING_DIR"] = os.path.join(args.logging_dir, run_name)

    transformers.set_seed(args.seed)  # before the new head is drawn
    tokenizer = load_tokenizer(args)
    with args.main_process_first():  # other processes then read the cache
        splits = load_splits(args, args.seed)
        settings = json.loads(args.to_json_string()) | {"world_size": args.world_size, "rows": count_rows(splits)}
        settings["batch_size"] = args.world_size * args.train_batch_size * args.gradient_accumulation_steps
        settings["resume_from_checkpoint"] = None
        check_settings(args, settings)
        splits = tokenize(splits, tokenizer)
    names = splits["train"].features["labels"].names
    if args.positive_label is not None and (len(names) != 2 or args.positive_label not in names):
        raise UserError(f"--positive_label {args.positive_label}: not one of two classes {short(names)}")
    positive = names.index(args.positive_label or names[1])
    model = load_model(args, names)
    check_passes(model, tokenizer, splits, args.rdrop_alpha)

    callbacks = [BestCheckpoint()]
    patience, threshold = args.early_stopping_patience, args.early_stopping_threshold
    if patience > 0 and args.eval_strategy != "no":
        callbacks.append(transformers.EarlyStoppingCallback(patience, threshold))
    pad_to = 8 if args.mixed_precision != "no" and tokenizer.model_max_length % 8 == 0 else None
    trainer = RDropTrainer(
        model=model,
        args=args,
        data_collator=transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=pad_to),
        train_dataset=splits["train"],
        # without validation data: test, as published
        eval_dataset=splits.get("validation", splits.get("test")),
        processing_class=tokenizer,
        compute_metrics=lambda eval_pred: compute_metrics(eval_pred, positive, args.label_smoothing_factor),
        callbacks=callbacks,
        alpha=args.rdrop_alpha,
        length_buckets=args.length_buckets,
    )
    results = train(trainer, checkpoint, settings)
    return finish(trainer, splits, positive, results)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        PartialState().print(f"train_rdrop.py: error: {' '.join(str(error).split())[:1000]}", file=sys.stderr)
        sys.exit(2)
