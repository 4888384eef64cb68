"""How the tests start the script, and what the fixtures give.

Most tests call the script's functions in their own process:

    train(folder, *argv, "--seed", "1")      main() with all output below `folder`; returns all_results.json
    load_splits(OwnArguments(train_file=...))    only reads data

`argv` names the tiny model and data set that tiny_imdb.py makes. `FEW` cuts a run to two epochs of four steps, which
take about a second. Where the claim is about a process (it is killed, or there are two of them), `start(*flags)` starts
`python train_rdrop.py` in `tmp_path`, forked from a server that has done the imports, and `start_two` starts both
processes of a run as torchrun does. `status_2(argv)` runs the script's last lines and gives what it says on stderr.

Plain `pytest` leaves out tests/experiments; `pytest tests/experiments` runs them. Nothing here needs a network, and
the caches of Hugging Face are in a folder of their own, which is deleted at exit.
"""

import atexit
import csv
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

# before any import of a library that reads these
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_home_")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_rdrop.py"
EXPERIMENTS = ROOT / "tests" / "experiments"
FEW = ["--max_train_samples", "64", "--max_eval_samples", "32", "--num_train_epochs", "2", "--logging_steps", "2"]
LAST = ["--resume_from_checkpoint", "last"]
sys.path.insert(0, str(ROOT))

# the server imports these once; each start of the script is forked from it
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    ["transformers.trainer", "transformers.models.auto.modeling_auto", "transformers.models.roberta.modeling_roberta"]
    + ["transformers.integrations", "datasets", "sklearn.metrics", "torch.utils.tensorboard", "torch._dynamo"]
)


def pytest_ignore_collect(collection_path, config):
    """Leave out tests/experiments unless the command line names it."""
    named = any((config.invocation_params.dir / arg).is_relative_to(EXPERIMENTS) for arg in config.args)
    return True if collection_path == EXPERIMENTS and not named else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`pytest -n auto` keeps the tests of a file together: they share its runs, and the server for processes."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getoption("dist") == "load" else None


def train(folder, *flags):
    """`main()` with its results in `folder`/results and its curves in `folder`/logs; later flags win."""
    from train_rdrop import main

    defaults = ["--output_dir", Path(folder, "results"), "--logging_dir", Path(folder, "logs")]
    return main([str(flag) for flag in [*defaults, *flags]])


def read_json(*path):
    return json.loads(Path(*path).read_text())


def predictions(folder):
    """The rows of `predictions.csv` in `folder`, as strings."""
    with open(Path(folder, "predictions.csv"), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def weights(folder):
    """The weights in `folder`, by name."""
    from safetensors.torch import load_file

    return load_file(Path(folder, "model.safetensors"))


def same_weights(one, two):
    """Whether the models in both folders are equal, bit for bit."""
    first, second = weights(one), weights(two)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def contents(folder):
    """The bytes of every file below `folder`, by path."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def die(moment, place):
    """Make this process kill itself at a step, ("step", 7), or when it would write a file, ("save", "scheduler.pt")."""
    import torch
    from transformers import TrainerCallback, trainer

    class DieAtStep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if (moment, place) == ("step", state.global_step):
                os.kill(os.getpid(), signal.SIGKILL)

    def save(content, file, *args, real=torch.save, **kwargs):
        if moment == "save" and str(file).endswith(place):
            os.kill(os.getpid(), signal.SIGKILL)
        real(content, file, *args, **kwargs)

    trainer.DEFAULT_CALLBACKS.append(DieAtStep)
    torch.save = save


def start_here(argv, folder, env, log, dies):
    """In the child: run `python train_rdrop.py *argv` in `folder`, with its output in `log`.out and `log`.err."""
    multiprocessing.set_start_method("fork", force=True)  # for the workers of data loaders
    os.chdir(folder)
    os.environ.update(env)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    if dies:
        die(*dies)
    sys.argv = [str(SCRIPT), *argv]
    runpy.run_path(str(SCRIPT), run_name="__main__")


class Run:
    """The script, started in the background. After `wait()`, its `status` and what it printed: `out`, `err`."""

    def __init__(self, argv, folder, env=None, name="run", dies=None):
        self.folder, self.log = Path(folder), Path(folder, name)
        for stream in ("out", "err"):
            Path(f"{self.log}.{stream}").touch()
        arguments = ([str(word) for word in argv], folder, env or {}, self.log, dies)
        self.process = server.Process(target=start_here, args=arguments)
        self.process.start()

    def wait(self, timeout=120):
        self.process.join(timeout)
        self.out, self.err = (Path(f"{self.log}.{stream}").read_text() for stream in ("out", "err"))
        assert self.process.exitcode is not None, f"still running after {timeout} s\n{self.err}"
        self.status = self.process.exitcode
        return self


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with `model` and `data`, which the script learns in some seconds."""
    import tiny_imdb

    folder = tmp_path_factory.mktemp("tiny")
    tiny_imdb.write_model(folder / "model")
    tiny_imdb.write_data(folder / "data")
    return folder


@pytest.fixture(scope="session")
def argv(tiny):
    """Arguments of a short run on a CPU: the recipe, but for model, data and learning rate."""
    paths = ["--model_name_or_path", tiny / "model", "--dataset_name", tiny / "data"]
    return [*map(str, paths), "--learning_rate", "1e-3", "--use_cpu"]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Restore the environment variable that `main()` sets after each test."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, argv):
    """The output folder of a finished run of `FEW`, with checkpoint-4 and checkpoint-8. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("finished")
    train(folder, *argv, *FEW)
    return folder / "results"


@pytest.fixture
def start(tmp_path, argv):
    """`start(*flags)` starts a short run in `tmp_path`, with its results in results_rdrop, and gives its `Run`."""
    runs = []

    def start(*flags, **kwargs):
        runs.append(Run([*argv, *flags], tmp_path, name=f"run{len(runs)}", **kwargs))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.exitcode is None:
            run.process.kill()


@pytest.fixture
def start_two(start):
    """`start_two(*flags)` starts both processes of one run, with the environment that torchrun gives them."""

    def start_two(*flags, **kwargs):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        return [start(*flags, "--ddp_backend", "gloo", env=env | rank, **kwargs) for rank in ranks]

    return start_two


@pytest.fixture
def status_2(monkeypatch, capfd):
    """`status_2(argv)` runs the script with a mistake: it must exit with 2; gives the lines of stderr."""

    def status_2(argv):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert end.value.code == 2
        return capfd.readouterr().err.splitlines()

    return status_2
