"""Wait, before arguments.json is written, for another process that wants to: both have found the folder empty."""

import os
import time
from pathlib import Path


def meet(self, mode="r", *args, real=Path.open, **kwargs):
    if self.name == "arguments.json" and mode != "r":
        Path(f"here{os.getpid()}").touch()
        while len(list(Path().glob("here*"))) < 2:
            time.sleep(0.01)
    return real(self, mode, *args, **kwargs)


Path.open = meet
