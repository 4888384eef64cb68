"""Let process 0 take two seconds to save the final model, and say so by a file: the others must not end before it."""

import time
from pathlib import Path

from transformers import Trainer


def save_model(self, *args, _internal_call=False, real=Trainer.save_model, **kwargs):
    if self.is_world_process_zero() and not _internal_call:
        time.sleep(2)
    real(self, *args, _internal_call=_internal_call, **kwargs)
    if self.is_world_process_zero() and not _internal_call:
        Path("saved").touch()


Trainer.save_model = save_model
