"""Wait, before arguments.json is written, for another process that wants to: both have found the folder empty."""

import builtins
import os
import time
from pathlib import Path


def meet(file, mode="r", *args, real=open, **kwargs):
    if str(file).endswith("arguments.json") and mode != "r":
        Path(f"here{os.getpid()}").touch()
        while len(list(Path().glob("here*"))) < 2:
            time.sleep(0.01)
    return real(file, mode, *args, **kwargs)


builtins.open = meet
