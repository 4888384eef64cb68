"""Fixtures: a tiny model and data set made on the spot, and the script started as a user starts it, but quickly."""

import csv
import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

# Before any Hugging Face import: caches of our own, no network, one thread for each of several processes at a time.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_home_")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import tiny_imdb

# A shell that starts pytest in the background has Ctrl-C ignored, by all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_rdrop.py"
PRELUDES = ROOT / "tests" / "preludes"
FIGURES = ("eval_loss", "eval_accuracy", "eval_f1", "eval_auc", "epoch")
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "experiments")]

# Most of a start is imports. This server has them done, and forks a fresh process for each start of the script.
PRELOAD = ["transformers.trainer", "transformers.models.auto.modeling_auto"]
PRELOAD += ["transformers.models.roberta.modeling_roberta", "transformers.integrations", "datasets", "sklearn.metrics"]
PRELOAD += ["torch.utils.tensorboard", "torch._dynamo"]
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(PRELOAD)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Let `pytest -n auto` mean `--dist worksteal`: tests of a module, which share its runs, mostly share a worker."""
    if config.getoption("dist") != "load":  # which -n stands for
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def start_here(argv, folder, env, log, prelude="", script=SCRIPT):
    """Become `python script *argv` in `folder`, output to `log`.out and `log`.err.

    `prelude`, e.g. "kill.py SIGTERM step 7", is run first: a file of tests/preludes/ and its arguments.
    """
    multiprocessing.set_start_method("fork", force=True)  # Linux's own again, for the workers of data loaders
    os.chdir(folder)
    os.environ.update(env)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    if prelude:
        sys.argv = prelude.split()
        runpy.run_path(str(PRELUDES / sys.argv[0]))
    sys.argv = [str(script), *argv]
    runpy.run_path(str(script), run_name="__main__")


class Run:
    """The script, started in the background: `wait()` for it, `process.kill()` it, look at what it wrote."""

    def __init__(self, argv, folder, env=None, name="run", prelude="", script=SCRIPT):
        self.folder = Path(folder)
        self.log = self.folder / name
        for stream in ("out", "err"):
            Path(f"{self.log}.{stream}").touch()
        arguments = ([str(a) for a in argv], folder, env or {}, self.log, prelude, script)
        self.process = server.Process(target=start_here, args=arguments)
        self.process.start()

    def wait(self, timeout=120):
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s\n{self.err}"
        self.status = self.process.exitcode
        return self

    @property
    def out(self):
        return Path(f"{self.log}.out").read_text()

    @property
    def err(self):
        return Path(f"{self.log}.err").read_text()

    @property
    def said(self):
        """What the script itself has said on stderr: its last lines, by the name in front."""
        return said(self.err)

    def json(self, name, output_dir="results_rdrop"):
        return json.loads((self.folder / output_dir / name).read_text())

    def assert_one_line(self, status, *words):
        """It has ended with `status` and one line on stderr that holds all `words`."""
        assert self.status == status and len(self.said) == 1 and "Traceback" not in self.err, self.err
        assert all(str(word) in self.said[0] for word in words), (words, self.said[0])

    def assert_traceback(self, *words):
        """It has ended with one traceback, and the error at its end, with the notes below it, holds all `words`."""
        assert self.status == 1 and self.said == [] and "Traceback" in self.err, self.err
        error = self.err[self.err.rindex("Traceback") :]
        assert all(str(word) in error for word in words), (words, error)


def said(err):
    return [line for line in err.splitlines() if line.startswith("train_rdrop.py: ")]


def wait_for(condition, timeout=60):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.002)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with `model` and `data`, which the script learns in some seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_imdb.write_model(folder / "model")
    tiny_imdb.write_data(folder / "data")
    return folder


@pytest.fixture(scope="session")
def argv(tiny):
    """Arguments of a short run: the recipe, but for model, data, learning rate and device."""
    paths = ["--model_name_or_path", tiny / "model", "--dataset_name", tiny / "data"]
    return [*paths, "--learning_rate", "1e-3", "--use_cpu"]


@pytest.fixture
def start(tmp_path, argv):
    """`start(*flags)` starts a short run in `tmp_path`, `start(*flags).wait()` ends with it."""
    runs = []

    def start(*flags, base=None, folder=tmp_path, **kwargs):
        name = f"run{len(runs)}"
        runs.append(Run([*(argv if base is None else base), *flags], folder, name=name, **kwargs))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.exitcode is None:
            run.process.kill()


def assert_same_end(one, two, outputs=("results_rdrop", "results_rdrop")):
    """Both runs have ended with the same figures and, bit for bit, the same weights: the best and the last."""
    from safetensors.torch import load_file

    ends = []
    for run, output in zip((one, two), outputs, strict=True):
        folder = run.folder / output
        last = max(folder.glob("checkpoint-*"), key=lambda checkpoint: int(checkpoint.name.split("-")[1]))
        figures = {name: run.json("all_results.json", output)[name] for name in FIGURES}
        weights = [load_file(path / "model.safetensors") for path in (folder, last)]
        ends.append((figures, last.name, *weights))
    (*seen, best, last), (*other_seen, other_best, other_last) = ends
    assert seen == other_seen
    for weights, other in ((best, other_best), (last, other_last)):
        assert weights.keys() == other.keys() and all(weights[name].equal(other[name]) for name in weights)


def newest_checkpoint(folder, processes=1):
    """The last complete checkpoint in `folder`, if any, for a run of so many processes."""
    from train_rdrop import complete_checkpoints

    return (complete_checkpoints(Path(folder).glob("checkpoint-*"), processes) or [None])[-1]


def predictions(folder):
    """The rows of `predictions.csv` in `folder`, as strings."""
    with open(Path(folder, "predictions.csv"), newline="") as file:
        return list(csv.DictReader(file))


def scalars(folder):
    """All scalars of all event files in `folder`: {tag: [(step, value), ...]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in sorted(Path(folder).glob("events.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found
