#!/usr/bin/env python
"""Fine-tune RoBERTa (or any encoder) for text classification with R-Drop and label smoothing.

    python train_rdrop.py                                         # the published run: roberta-base on IMDB
    python train_rdrop.py --model_name_or_path MODEL --dataset_name FOLDER_OR_HUB_ID --output_dir OUT
    torchrun --nproc_per_node 2 train_rdrop.py                    # two GPUs
    tensorboard --logdir logs_rdrop                               # the curves
    python train_rdrop.py --help                                  # every flag with its default

R-Drop (Liang et al., NeurIPS 2021, arXiv 2106.14448) runs each batch through the model twice. Dropout draws other
masks each time; the loss asks both outputs for the label and both to agree:

    loss = 1/2 (CE_ls(z1, y) + CE_ls(z2, y)) + alpha * 1/2 (KL(p2 || p1) + KL(p1 || p2)),  p = softmax(z)

The file reads in the order in which data flows: arguments, data, model, loss, trainer, metrics, main.
"""

import json
import logging
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import parse_flag_from_env
from datasets import ClassLabel, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from filelock import FileLock, Timeout
from huggingface_hub import constants
from huggingface_hub.utils import logging as hub_logging
from packaging.version import parse as parse_version
from safetensors import SafetensorError
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    HfArgumentParser,
    Trainer,
    TrainerState,
    TrainingArguments,
    enable_full_determinism,
    set_seed,
)
from transformers.hf_argparser import HfArg
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations

OTHER_HUB = f"The Hub asked was {constants.ENDPOINT}: give a local folder, or set HF_ENDPOINT in the shell to a mirror."
METRICS = ("accuracy", "f1", "auc")
SPEAKS = os.environ.get("LOCAL_RANK", "0") == "0"  # of several processes, one a machine
logger = logging.getLogger("train_rdrop")
logger.setLevel(logging.WARNING if SPEAKS else logging.CRITICAL)


def fail(message, status=2):
    """End the process with one line on stderr."""
    if SPEAKS:
        if status != 2:
            print(file=sys.stderr)  # a progress bar stands on this line
        print(f"train_rdrop.py: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


# ------------------------------------------------------------------------------------------------------- arguments


@dataclass
class RDropArguments(TrainingArguments):
    """The published recipe as defaults, beside every flag of `TrainingArguments`.

    Raises:
        ValueError: for values that no run can have, among them those that `TrainingArguments` refuses.
    """

    # model and data
    model_name_or_path: str = HfArg(default="FacebookAI/roberta-base", help="Hub id or local folder of the encoder.")
    dataset_name: str = HfArg(
        default="stanfordnlp/imdb", help="Hub id or local folder (csv, json, parquet) with the splits train and test."
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the data set, if it has several.")
    text_column: str = HfArg(default="text", help="Column that holds the text.")
    label_column: str = HfArg(default="label", help="Column that holds the label: integers 0..n-1 or strings.")
    max_length: int | None = HfArg(default=None, help="Tokens kept of a text. Default: as many as the model takes.")
    max_train_samples: int | None = HfArg(default=None, help="Train on this many examples, drawn with the seed.")
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate on this many examples, drawn with the seed.")
    validation_fraction: float = HfArg(
        default=0.0,
        help="Share of the train split held out, stratified by label, to choose the best checkpoint and stop early on; "
        "the test split is then evaluated once, at the end. With 0, as published, the test split chooses.",
    )
    # loss
    rdrop_alpha: float = HfArg(default=5.0, help="Weight of the KL term. With 0: one forward pass, plain baseline.")
    label_smoothing_factor: float = HfArg(default=0.1, help="Share of the label spread evenly over all classes.")
    # optimization
    learning_rate: float = HfArg(default=2e-5, help="Peak learning rate of AdamW.")
    weight_decay: float = HfArg(default=0.01, help="Weight decay of AdamW, on all but biases and layer norms.")
    lr_scheduler_type: str = HfArg(default="cosine", help="Shape of the learning rate after the warmup.")
    warmup_steps: float = HfArg(default=0.1, help="Linear warmup: a number of steps or, below 1, a share of them.")
    per_device_train_batch_size: int = HfArg(default=16, help="Examples per device and forward pass in training.")
    per_device_eval_batch_size: int = HfArg(default=16, help="Examples per device and forward pass in evaluation.")
    num_train_epochs: float = HfArg(default=5.0, help="Epochs to train, unless stopped early.")
    fp16: bool = HfArg(default=True, help="Train in fp16. Off without CUDA, and where --bf16 is given.")
    seed: int = HfArg(default=42, help="Seed of the model's new head, of dropout and of every draw from the data.")
    # evaluation and checkpoints
    output_dir: str = HfArg(default="./results_rdrop", help="Folder of checkpoints, best model and figures.")
    eval_strategy: str = HfArg(default="epoch", help="When to evaluate: no, steps or epoch.")
    save_strategy: str = HfArg(default="epoch", help="When to save a checkpoint: no, steps, epoch or best.")
    save_total_limit: int | None = HfArg(default=2, help="Checkpoints kept, the best always among them.")
    load_best_model_at_end: bool = HfArg(default=True, help="End with the best checkpoint, not with the last.")
    metric_for_best_model: str = HfArg(default="f1", help="What best means: f1, accuracy, auc or loss.")
    early_stopping_patience: int = HfArg(default=3, help="Evaluations without improvement before stopping; 0: never.")
    early_stopping_threshold: float = HfArg(default=0.01, help="What an improvement must exceed to count.")
    # logging
    logging_steps: float = HfArg(default=50, help="Steps between two logs or, below 1, a share of the steps.")
    report_to: list[str] = HfArg(
        default_factory=lambda: ["tensorboard"], help="Where curves go: tensorboard, none, all or integrations."
    )
    logging_dir: str = HfArg(default="./logs_rdrop", help="TensorBoard's folder; each run gets a sub-folder.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="Hide losses that are not finite from the log.")
    # several processes: all parameters are used, and buffers broadcast between the two passes break the backward
    ddp_find_unused_parameters: bool = HfArg(default=False, help="Let DDP look for parameters without gradient.")
    ddp_broadcast_buffers: bool = HfArg(default=False, help="Let DDP broadcast buffers before each forward pass.")

    def __post_init__(self):
        # `accelerate launch` hands its own choices over in the environment
        on_cpu = self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
        self.bf16 = self.bf16 or os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
        self.fp16 = self.fp16 and not self.bf16 and not on_cpu and torch.cuda.is_available()
        self.dataloader_pin_memory &= torch.accelerator.is_available()  # torch would warn in every epoch
        super().__post_init__()
        self.logging_dir = os.path.expanduser(self.logging_dir)
        integrations = get_available_reporting_integrations()
        if not set(self.report_to) <= {*integrations, "kubeflow"}:
            raise ValueError(f"--report_to {self.report_to}: only these are installed: {', '.join(integrations)}")
        for names, allowed, holds in (
            ("rdrop_alpha early_stopping_threshold", "finite and at least 0", lambda x: 0 <= x < math.inf),
            ("label_smoothing_factor validation_fraction", "in [0, 1)", lambda x: 0 <= x < 1),
            ("learning_rate num_train_epochs", "finite and above 0", lambda x: 0 < x < math.inf),
            ("max_length max_train_samples max_eval_samples", "at least 1", lambda x: x is None or x >= 1),
            ("per_device_train_batch_size per_device_eval_batch_size", "at least 1", lambda x: x >= 1),
            ("gradient_accumulation_steps", "at least 1", lambda x: x >= 1),
            ("early_stopping_patience dataloader_num_workers", "at least 0", lambda x: x >= 0),
            ("seed", "in [0, 2**32)", lambda x: 0 <= x < 2**32),
        ):
            for name in names.split():
                if not holds(getattr(self, name)):
                    raise ValueError(f"--{name} must be {allowed}, not {getattr(self, name)}")
        if self.text_column == self.label_column:
            raise ValueError(f"--text_column and --label_column are both {self.text_column}")
        if self.batch_eval_metrics:
            raise ValueError("--batch_eval_metrics cannot be had: F1 and AUC are not means over batches")
        if self.metric_for_best_model.removeprefix("eval_") not in (*METRICS, "loss"):
            raise ValueError(f"--metric_for_best_model {self.metric_for_best_model}: say one of {METRICS} or loss")


def parse_args(argv=None) -> RDropArguments:
    """Read the command line (`argv`: a list of strings, default `sys.argv[1:]`); mistakes end the process."""
    parser = HfArgumentParser(RDropArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail  # argparse would print its usage first, some 150 flags
    try:
        args, unknown = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
    except (ValueError, ImportError) as error:
        fail(error)
    if unknown:
        fail(f"unknown arguments: {' '.join(unknown)}. --help lists those that there are.")
    return args


# ------------------------------------------------------------------------------------------ output and checkpoints


def check_output(args: RDropArguments) -> tuple[Path | None, FileLock | None]:
    """Ends the process where another run would be lost, or nothing could be saved.

    Returns:
        The checkpoint to resume from, if any, and a lock on the output folder, held as long as the object lives.
    """
    output_dir, asked, checkpoint = Path(args.output_dir), args.resume_from_checkpoint, None
    if asked == "last":
        checkpoint = newest_complete(output_dir)
        if checkpoint is None:
            fail(f"nothing to resume from: there is no complete checkpoint in {output_dir}")
    elif asked is not None:
        checkpoint = Path(asked).expanduser()
        if not is_complete(checkpoint):
            fail(f"--resume_from_checkpoint {asked}: there is no complete checkpoint. Give its folder, or: last")
    ours = "checkpoint-* config.json model*.safetensors tokenizer.json training_args.bin *_results.json".split()
    earlier = [path for pattern in ours for path in output_dir.glob(pattern)]
    if earlier and (checkpoint is None or checkpoint.resolve().parent != output_dir.resolve()):
        resume = "go on with it by --resume_from_checkpoint last"
        way = resume if any(map(is_complete, earlier)) else "move it away, for it has no complete checkpoint"
        fail(f"{output_dir} holds an earlier run ({earlier[0].name}): {way}, or choose another --output_dir")
    written = [args.output_dir, args.logging_dir] if "tensorboard" in args.report_to else [args.output_dir]
    for folder in written if args.should_save else ():
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            fail(f"cannot write to {folder}: {error.strerror}")
    if args.process_index > 0:
        return checkpoint, None
    lock = FileLock(output_dir / "_run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        fail(f"another run is writing to {output_dir}: choose another --output_dir")
    except NotImplementedError:
        logger.warning(f"the file system of {output_dir} has no locks: see that no other run writes there.")
    return checkpoint, lock


def newest_complete(output_dir: Path) -> Path | None:
    """The newest complete checkpoint in `output_dir`, with a warning for each newer one that is passed over."""
    steps = {int(path.name[11:]): path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdigit()}
    for _, checkpoint in sorted(steps.items(), reverse=True):
        if is_complete(checkpoint):
            return checkpoint
        logger.warning(f"{checkpoint} is incomplete, or was saved without the optimizer, and is passed over.")
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether all was written that a run needs to go on: `trainer_state.json` last of all (see `GuardedTrainer`)."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return all(any(checkpoint.glob(part)) for part in ("*model*", "optimizer*", "scheduler.pt", "rng_state*.pth"))


# ------------------------------------------------------------------------------------------------------------ data


def folder_or_hub_id(flag, name, hub_id) -> str:
    """`name` as a path if it is a folder, else as it is if it matches `hub_id`; anything else ends the process."""
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        return os.path.abspath(folder)
    if os.path.exists(folder) or not re.fullmatch(hub_id, name):
        fail(f"--{flag} {name}: neither a folder that is there nor a Hub id of the form owner/name")
    return name


def load_splits(args: RDropArguments) -> DatasetDict:
    """Load, check and sub-sample the data; mistakes in them end the process.

    Returns:
        Splits `train`, `test` and, with `--validation_fraction`, `validation`; columns `text` (string) and `labels`
        (ClassLabel, which carries the label names).
    """
    name = folder_or_hub_id("dataset_name", args.dataset_name, r"\w[\w.-]*/[\w.-]+")
    hub_logging.set_verbosity_error()  # an unreachable Hub is reported below, once
    try:
        with args.main_process_first(desc="loading the data"):
            found = load_dataset(name, args.dataset_config_name)
    except (OSError, ValueError, DatasetsError) as error:
        if os.path.isdir(name):
            fail(f"cannot read {name}: {error.__cause__ or error} (Is a split empty, or are its columns others?)")
        fail(f"cannot get the data set {name}: {error}. {OTHER_HUB}")

    splits = DatasetDict()
    for split in ("train", "test"):  # no other: IMDB's split unsupervised is labelled -1
        if split not in found:
            fail(f"{name} has no split {split!r}, only: {', '.join(found)}")
        rows = found[split]
        for flag, column in (("text_column", args.text_column), ("label_column", args.label_column)):
            if column not in rows.column_names:
                fail(f"split {split!r} has no column {column!r}, only {rows.column_names}. Use --{flag}.")
        if len(rows) == 0:
            fail(f"split {split!r} is empty")
        texts, labels = rows[args.text_column][:], rows[args.label_column][:]
        refuse(split, args.text_column, texts, lambda x: type(x) is not str or not x.strip(), "empty or not a string")
        refuse(split, args.label_column, labels, lambda x: x is None or x == "" or x != x, "missing")
        if split == "train":
            classes, names = find_classes(rows.features[args.label_column], labels)
        known = f"not among the {len(classes)} classes, {classes[0]!r} to {classes[-1]!r} (integers must count from 0)"
        refuse(split, args.label_column, labels, lambda x: x not in classes, known)
        ids = [classes.index(label) for label in labels]
        rows = rows.select_columns([args.text_column]).rename_columns({args.text_column: "text"})
        splits[split] = rows.add_column("labels", ids, feature=ClassLabel(names=names))

    if args.validation_fraction:
        try:
            parts = splits["train"].train_test_split(
                args.validation_fraction, stratify_by_column="labels", seed=args.seed
            )
        except ValueError as error:
            fail(f"--validation_fraction {args.validation_fraction} cannot be held out: {error}")
        splits = DatasetDict(train=parts["train"], validation=parts["test"], test=splits["test"])
    for split in splits:
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        if limit is not None and limit < len(splits[split]):
            splits[split] = splits[split].shuffle(seed=args.seed).select(range(limit))
    chooser = splits.get("validation", splits["test"])
    if args.metric_for_best_model.endswith("auc") and len(set(chooser["labels"])) < len(names):
        fail("--metric_for_best_model auc is undefined: the evaluated split has no example of some class")
    return splits


def find_classes(feature, labels: list) -> tuple[list, list[str]]:
    """The values that a label can have, in the order of their ids, and their names, from the train split's `labels`."""
    if len({type(label) for label in labels}) > 1 or not isinstance(labels[0], (int, str)):
        fail(f"the labels must be integers 0..n-1 or strings, not {feature}")
    values = sorted(set(labels))
    if len(values) < 2:
        fail(f"split 'train' has one label only, {labels[0]!r}: there is nothing to learn")
    if isinstance(feature, ClassLabel):
        return list(range(feature.num_classes)), feature.names
    return values if isinstance(labels[0], str) else list(range(len(values))), [str(value) for value in values]


def refuse(split, column, values, is_bad, what):
    """End the process if any of `values` is bad, saying how many are and which is the first."""
    bad = [row for row, value in enumerate(values) if is_bad(value)]
    if bad:
        fail(
            f"split {split!r}: {len(bad)} of {len(values)} rows have a {column!r} that is {what}, the first in row "
            f"{bad[0]} (counted from 0): {str(values[bad[0]])[:40]!r}. Mend them."
        )


def tokenize(splits: DatasetDict, tokenizer, args: RDropArguments, max_length: int) -> DatasetDict:
    """Replace the texts by their tokens, at most `max_length`; evaluation splits come out longest first.

    Returns:
        `splits` with the columns that the tokenizer makes (`input_ids`, ...), `length` (tokens) and `labels`.
    """

    def encode(batch):
        return tokenizer(batch["text"], truncation=True, max_length=max_length, return_length=True)

    # The first call sets the tokenizer's truncation, which `datasets` hashes: without it the hash of the first split
    # differs from that of the others, and the cache is missed by a second run or process.
    encode({"text": [""]})
    with args.main_process_first(desc="tokenizing"):
        splits = splits.map(encode, batched=True, remove_columns=["text"], desc="Tokenizing")
    if not any(set(tokens) - set(tokenizer.all_special_ids) for tokens in splits["train"][:100]["input_ids"]):
        fail("the tokenizer knows no word of the first 100 texts: are its files in the model's folder?")
    for split in splits.keys() - {"train"}:  # little padding, and memory runs out at once or not at all
        longest_first = np.argsort(splits[split]["length"][:], kind="stable")[::-1]
        splits[split] = splits[split].select(longest_first)
    return splits


# ----------------------------------------------------------------------------------------------------------- model


def load_model(args: RDropArguments, names: list[str]):
    """Load tokenizer and model, with a new head for the labels `names`; what cannot be loaded ends the process.

    Returns:
        tokenizer, model (float32, on the CPU) and the number of tokens that the model takes.
    """
    path = folder_or_hub_id("model_name_or_path", args.model_name_or_path, r"\w[\w.-]*(/[\w.-]+)?")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        if tokenizer.pad_token is None:
            fail(f"the tokenizer of {path} has no padding token, so that no batch can be made of its texts")
        if args.max_length is not None and args.max_length <= tokenizer.num_special_tokens_to_add():
            fail(f"--max_length {args.max_length} leaves no token of a text beside the model's special tokens")
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            dtype=torch.float32,  # the default is the checkpoint's dtype, and fp16 needs float32 weights to update
            ignore_mismatched_sizes=True,  # a head trained on other labels gives way to a new one
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        fail(f"cannot load the model {path}: {error}. {'' if os.path.isdir(path) else OTHER_HUB}")

    not_loaded = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    new = [key for key in not_loaded if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key]
    if new:  # only the head, and a pooler, may be new
        fail(f"the weights of {path} do not fit its config: {len(new)} parts of the encoder are missing, as {new[0]}")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))

    # A position table with a padding index counts from there (RoBERTa: 514 positions take 512 tokens).
    positions = getattr(model.config, "max_position_embeddings", None) or -1
    limits = [tokenizer.model_max_length, positions if positions > 0 else math.inf]
    for module_name, module in model.named_modules():
        if module_name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    limit = min(limits)
    if limit > 1e6:  # neither knows a limit (XLNet): the recipe's
        limit = 512
    tokenizer.model_max_length = limit  # saved with the tokenizer, so that pipeline(..., truncation=True) is right

    if args.rdrop_alpha > 0 and not passes_differ(model, tokenizer):
        logger.warning(
            "This model has no active dropout: both passes give the same output, the KL term is zero and R-Drop does "
            "nothing. Set its dropout probabilities in config.json, or use --rdrop_alpha 0."
        )
    return tokenizer, model, limit


def passes_differ(model, tokenizer) -> bool:
    """Whether two passes in training mode give different logits. Leaves the random state as it was."""
    inputs = tokenizer("two passes of the same text", return_tensors="pt", truncation=True)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model.train()
        return not torch.equal(model(**inputs).logits, model(**inputs).logits)


# ------------------------------------------------------------------------------------------------------------ loss


class RDropLoss(nn.Module):
    """R-Drop with label smoothing: 1/2 (CE1 + CE2) + alpha * 1/2 (KL(p2 || p1) + KL(p1 || p2)).

    This is Liang et al. (2021), section 2.1, with the CE of the two passes averaged where the paper adds them: its
    loss with weight 2 alpha is twice this one. Everything is computed in float32 and averaged over the batch.

    Args:
        alpha: weight of the KL term, finite and at least 0.
        label_smoothing: share of the label spread evenly over all classes, in [0, 1).

    Raises:
        ValueError: if `alpha` or `label_smoothing` is out of range.
    """

    def __init__(self, alpha: float = 1.0, label_smoothing: float = 0.0):
        super().__init__()
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be finite and at least 0, not {alpha}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
        self.alpha = alpha
        self.label_smoothing = label_smoothing

    def cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Label-smoothed cross-entropy in nats of `logits` (batch, classes) and `labels` (batch); a scalar."""
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)

    def kl(self, logits1: torch.Tensor, logits2: torch.Tensor) -> torch.Tensor:
        """Half the sum of both KL divergences in nats, of two logits (batch, classes); a scalar."""
        log_p1, log_p2 = F.log_softmax(logits1.float(), dim=-1), F.log_softmax(logits2.float(), dim=-1)
        forward = F.kl_div(log_p1, log_p2, reduction="batchmean", log_target=True)  # KL(p2 || p1)
        backward = F.kl_div(log_p2, log_p1, reduction="batchmean", log_target=True)  # KL(p1 || p2)
        return 0.5 * (forward + backward)

    def parts(self, logits1: torch.Tensor, logits2: torch.Tensor, labels: torch.Tensor):
        """The two terms apart, neither weighted: mean CE of the passes, and KL; two scalars."""
        ce = 0.5 * (self.cross_entropy(logits1, labels) + self.cross_entropy(logits2, labels))
        return ce, self.kl(logits1, logits2)

    def forward(self, logits1: torch.Tensor, logits2: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of two logits (batch, classes) for `labels` (batch, integers); a float32 scalar."""
        ce, kl = self.parts(logits1, logits2, labels)
        return ce + self.alpha * kl


# --------------------------------------------------------------------------------------------------------- trainer


class StopRequested(Exception):
    """Raised in the training loop once the checkpoint that a SIGTERM asked for is saved."""


class GuardedTrainer(Trainer):
    """A `Trainer` that can be killed, stopped or diverge at any moment without harm. Nothing in it is R-Drop's.

    Raises (from `train`):
        StopRequested: after a SIGTERM, with `--enable_jit_checkpoint`, once a checkpoint is saved.
        FloatingPointError: if a loss or an evaluation is not finite; nothing is saved from then on.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._first_bad_step = torch.tensor(math.inf, device=self.args.device)
        self._stop_requests = torch.zeros((), device=self.args.device)

    def _init_training_state(self, *args, **kwargs):
        epochs_and_steps = super()._init_training_state(*args, **kwargs)
        best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
        if best.is_dir():  # where it is now: the checkpoint resumed from knows the path of its first day
            self.state.best_model_checkpoint = str(best)
        return epochs_and_steps

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        # noted on the device: reading the value here would make the CPU wait for the GPU in every step
        bad_step = self._first_bad_step.clamp(max=self.state.global_step + 1)
        self._first_bad_step = torch.where(loss.isfinite(), self._first_bad_step, bad_step)
        return loss

    def check_loss(self):
        """Raise `FloatingPointError` if the loss of a step so far, on any process, was not finite."""
        step = self.accelerator.gather(self._first_bad_step).min().item()
        if step < math.inf:
            raise FloatingPointError(f"the loss of step {int(step)} is not finite")

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        # All processes stop after the same step, and before Trainer evaluates as if the training had come to its end.
        if self.args.enable_jit_checkpoint and self.accelerator.reduce(self._stop_requests).item() > 0:
            self.check_loss()
            if not is_complete(Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")):
                self.control.should_save = True
                self._save_checkpoint(self.model, None)
            raise StopRequested
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.check_loss()
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except FloatingPointError as error:  # of compute_metrics
            raise FloatingPointError(f"{error} after step {self.state.global_step}") from error

    def _save_checkpoint(self, model, trial):
        if not self.control.should_save:  # not due but a SIGTERM's, within a step, in each process in another one
            self._stop_requests += 1
            self.control.should_training_stop = False  # go on to the end of the step
            return
        if self.args.should_save:  # Trainer writes this file last: while it is missing, the checkpoint is incomplete
            checkpoint = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            (checkpoint / "trainer_state.json").unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # each process writes such a file, and trainer_state.json comes next


class RDropTrainer(GuardedTrainer):
    """A `Trainer` whose training steps run the model twice (once if `alpha` is 0) and take `RDropLoss`.

    Evaluation runs it once: without dropout both passes are equal, so that CE is the whole loss. `ce` and `kl`, means
    over all processes since the last log, stand in the log beside `loss` (`kl` only where two passes run).

    Args:
        alpha, label_smoothing: as in `RDropLoss`. All other arguments go to `Trainer`.
    """

    loss_is_scaled_for_ga = False  # a mean over each micro-batch: Trainer divides by the accumulation steps

    def __init__(self, *args, alpha: float = 1.0, label_smoothing: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the same, as versions know it that lack the attribute above
        self.rdrop_loss = RDropLoss(alpha, label_smoothing)
        self._sums = torch.zeros(3, device=self.args.device)  # CE, KL and steps since the last log

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch with `labels` (batch); with `return_outputs` also the logits of the first pass."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        two_passes = model.training and self.rdrop_loss.alpha > 0
        other = model(**inputs).logits if two_passes else logits  # equal logits: KL 0, and the CE of one pass
        ce, kl = self.rdrop_loss.parts(logits, other, labels)
        loss = ce + self.rdrop_loss.alpha * kl
        if model.training:
            parts = torch.stack([ce.detach(), kl.detach(), torch.ones_like(ce)])
            self._sums += parts / getattr(self, "current_gradient_accumulation_steps", 1)
        return (loss, {"logits": logits}) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        """Log as `Trainer` does, with CE and KL beside the training loss."""
        if "loss" in logs:
            ce, kl, steps = self.accelerator.reduce(self._sums).tolist()
            self._sums.zero_()
            logs["ce"] = ce / steps
            if self.rdrop_loss.alpha > 0:
                logs["kl"] = kl / steps
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Evaluate as `Trainer` does, with the loss averaged over samples, whatever the batches and processes."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if output.predictions is not None and output.label_ids is not None:
            # Trainer's mean over batches counts those samples twice that fill up the last batch of each process
            logits, labels = torch.from_numpy(output.predictions), torch.from_numpy(output.label_ids)
            output.metrics[f"{metric_key_prefix}_loss"] = self.rdrop_loss.cross_entropy(logits, labels).item()
        return output

    def _get_eval_sampler(self, eval_dataset):
        return None  # in the order of the data set, longest first, under every --train_sampling_strategy

    def create_model_card(self, *args, **kwargs):
        """Write `Trainer`'s model card, which names data, metrics and settings, and add the recipe."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            with open(os.path.join(self.args.output_dir, "README.md"), "a", encoding="utf-8") as card:
                card.write(
                    f"\n### Recipe\n\nR-Drop ([Liang et al., 2021](https://arxiv.org/abs/2106.14448)), alpha "
                    f"{self.rdrop_loss.alpha} (0: plain baseline), label smoothing {self.rdrop_loss.label_smoothing}; "
                    "loss `1/2 (CE1 + CE2) + alpha/2 (KL(p2||p1) + KL(p1||p2))` of two forward passes of each batch.\n"
                )


# --------------------------------------------------------------------------------------------------------- metrics


def compute_metrics(eval_pred) -> dict[str, float]:
    """Accuracy, F1 and ROC AUC of `eval_pred` (logits (n, classes), labels (n)).

    Two classes: F1 of class 1, and AUC from its softmax probability. More: macro F1 and one-vs-rest macro AUC. AUC is
    left out, with a warning, where a class has no example in the labels: it is undefined there.

    Raises:
        FloatingPointError: if a logit is not finite.
    """
    logits, labels = eval_pred[0], eval_pred[1]
    if not np.isfinite(logits).all():
        raise FloatingPointError("the logits of the evaluation are not finite")
    classes = np.arange(logits.shape[-1])
    predictions = logits.argmax(axis=-1)
    metrics = {
        "accuracy": accuracy_score(labels, predictions),
        "f1": f1_score(labels, predictions, average="binary" if len(classes) == 2 else "macro"),
    }
    missing = np.setdiff1d(classes, labels)
    if len(missing) > 0:
        logger.warning("AUC is undefined and left out: no label of class %s.", ", ".join(map(str, missing)))
        return metrics
    probabilities = torch.from_numpy(logits).double().softmax(dim=-1).numpy()
    scores = probabilities[:, 1] if len(classes) == 2 else probabilities
    metrics["auc"] = roc_auc_score(labels, scores, multi_class="ovr")
    return metrics


# ------------------------------------------------------------------------------------------------------------ main


def main(argv=None) -> dict[str, float]:
    """Train as `argv` (a list of strings, default: the command line) says; returns what `all_results.json` holds."""
    if parse_version(transformers.__version__) < parse_version("5.17"):
        fail(f"transformers {transformers.__version__} is too old: 5.17 or later is needed (see requirements.txt)")
    args = parse_args(argv)
    try:
        return run(args)
    except ImportError as error:  # of a package that a flag asks for, such as an optimizer's
        fail(error)
    except KeyboardInterrupt:
        end, status = "interrupted", 130
    except StopRequested:
        end, status = "stopped by SIGTERM", 143
    except FloatingPointError as error:
        end, status = f"{error}: the training has diverged. Lower --learning_rate, or try --bf16 or --fp16 false", 1
    checkpoint = newest_complete(Path(args.output_dir))
    resume = f"Add --resume_from_checkpoint last to the same command to go on from {checkpoint}."
    fail(f"{end}. {resume if checkpoint else 'No checkpoint has been saved.'}", status)


def run(args: RDropArguments) -> dict[str, float]:
    """Load data and model, train, evaluate and save; returns the metrics."""
    checkpoint, lock = check_output(args)
    (enable_full_determinism if args.full_determinism else set_seed)(args.seed)  # before the new head is drawn
    splits = load_splits(args)
    names = splits["train"].features["labels"].names
    if SPEAKS:
        sizes = (f"{len(rows)} {split}" for split, rows in splits.items())
        print(f"Data: {', '.join(sizes)}; labels: {', '.join(names)}")
    tokenizer, model, limit = load_model(args, names)
    if args.max_length is not None and args.max_length > limit:
        logger.warning(f"--max_length {args.max_length} is more than the model takes: texts are cut to {limit} tokens.")
    max_length = min(args.max_length or limit, limit)
    splits = tokenize(splits, tokenizer, args, max_length)

    patience = args.early_stopping_patience or sys.maxsize
    early_stopping = EarlyStoppingCallback(patience, args.early_stopping_threshold)
    schedule = args.max_steps, args.num_train_epochs
    if checkpoint:  # Trainer restores all but the patience used up (or, by a flag, with it the old patience itself)
        state = TrainerState.load_from_json(checkpoint / "trainer_state.json")
        saved = state.stateful_callbacks.get("EarlyStoppingCallback", {"attributes": {}})["attributes"]
        early_stopping.early_stopping_patience_counter = saved.get("early_stopping_patience_counter", 0)
        if early_stopping.early_stopping_patience_counter >= patience:
            args.max_steps, args.num_train_epochs = -1, int(state.epoch)  # it had stopped: no epoch is left

    # Tensor cores like multiples of 8, which must not pad beyond the model's positions.
    pad_to_8 = (args.fp16 or args.bf16) and -(-max_length // 8) * 8 <= limit
    trainer = RDropTrainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation", splits["test"]),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if pad_to_8 else None),
        compute_metrics=compute_metrics,
        callbacks=[early_stopping] if args.eval_strategy != "no" else [],
        alpha=args.rdrop_alpha,
        label_smoothing=args.label_smoothing_factor,
    )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):  # each run in a folder of its own, named by its start
            callback.logging_dir = os.path.join(args.logging_dir, f"{datetime.now():%Y-%m-%d_%H-%M-%S.%f}"[:-3])

    results = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    args.max_steps, args.num_train_epochs = schedule
    if checkpoint:
        results.pop("train_loss")  # Trainer's mean knows nothing of the steps before the interruption
    trainer.remove_callback(EarlyStoppingCallback)  # its work is done, and it would ask the test split for eval_f1
    trainer.save_model()
    trainer.log_metrics("train", results)
    trainer.save_metrics("train", results, combined=False)
    evaluations = {"eval": "validation", "test": "test"} if "validation" in splits else {"eval": "test"}
    for prefix, split in evaluations.items():
        vars(trainer).pop("_eval_dataloaders", None)  # with persistent workers Trainer would evaluate the last again
        metrics = trainer.evaluate(splits[split], metric_key_prefix=prefix)
        trainer.log_metrics(prefix, metrics)
        trainer.save_metrics(prefix, metrics, combined=False)
        results.update(metrics)
    trainer.save_metrics("all", results, combined=False)  # at once: Trainer would read back what a kill cut short
    trainer.save_state()
    if args.push_to_hub:
        on_hub = None if os.path.isdir(args.dataset_name) else args.dataset_name
        trainer.push_to_hub(dataset=args.dataset_name, dataset_tags=on_hub, tags=["r-drop", "label-smoothing"])
    if trainer.is_world_process_zero():
        figures = {name: results.get(f"{'test' if 'validation' in splits else 'eval'}_{name}") for name in METRICS}
        shown = (f"{name} {figure:.4f}" for name, figure in figures.items() if figure is not None)
        curves = f"\nCurves:     tensorboard --logdir {args.logging_dir}" if "tensorboard" in args.report_to else ""
        print(
            f"\nTest split: {', '.join(shown)}"
            f"\nModel:      {args.output_dir}{curves}"
            f"\nTry it:     python -c \"from transformers import pipeline; print(pipeline('text-classification', "
            f"model={args.output_dir!r}, truncation=True)('A film to remember.'))\""
        )
    trainer.accelerator.end_training()
    if lock:
        lock.release()
    return results


if __name__ == "__main__":
    main()
