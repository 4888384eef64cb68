"""Fixtures: a tiny model and data set made on the spot, and the script started as a user starts it, but quickly."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

# Before any Hugging Face import: caches of our own, no network, one thread for each of several processes at a time.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_home_")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import tiny_imdb

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_rdrop.py"
sys.path.insert(0, str(ROOT))

# Most of a start is imports. This server has them done, and forks a fresh process for each start of the script.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    ["transformers.trainer", "transformers.models.auto.modeling_auto", "transformers.models.roberta.modeling_roberta"]
    + ["transformers.integrations", "datasets", "sklearn.metrics", "torch.utils.tensorboard", "torch._dynamo"]
)


def start_here(argv, folder, env, log, prelude):
    """Become `python train_rdrop.py *argv` in `folder`, output to `log`.out and `log`.err; `prelude` is run first."""
    os.chdir(folder)
    os.environ.update(env)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    sys.argv = [str(SCRIPT), *argv]
    exec(prelude, {})
    runpy.run_path(str(SCRIPT), run_name="__main__")


class Run:
    """The script, started in the background: `wait()` for it, `process.kill()` it, look at what it wrote."""

    def __init__(self, argv, folder, env=None, name="run", prelude=""):
        self.folder = Path(folder)
        self.log = self.folder / name
        arguments = ([str(a) for a in argv], folder, env or {}, self.log, prelude)
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
        return [line for line in self.err.splitlines() if line.startswith("train_rdrop.py: ")]

    def json(self, name, output_dir="results_rdrop"):
        return json.loads((self.folder / output_dir / name).read_text())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with `model` and `data`, and `argv`, which make the script learn them in some seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    subprocess.run([sys.executable, ROOT / "tests" / "tiny_imdb.py", folder], check=True, capture_output=True)
    return folder


@pytest.fixture
def argv(tiny):
    """Arguments of a short run: the recipe, but for model, data, learning rate and device."""
    return ["--model_name_or_path", tiny / "model", "--dataset_name", tiny / "data", "--learning_rate", "1e-3", "--use_cpu"]


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


def scalars(folder):
    """All scalars of all event files in `folder`: {tag: [(step, value), ...]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in sorted(Path(folder).glob("events.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found
