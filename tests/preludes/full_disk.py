"""Once checkpoint-8 is there the disk is full: `torch.save RuntimeError`, `torch.save OSError`, `json.dump OSError`."""

import errno
import json
import os
import sys

import torch

_, function, name = sys.argv
module, attribute = {"torch.save": (torch, "save"), "json.dump": (json, "dump")}[function]
error = {
    "RuntimeError": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 192 vs 86"),
    "OSError": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
}[name]
write = getattr(module, attribute)


def write_if_room(*args, **kwargs):
    if os.path.exists("results_rdrop/checkpoint-8"):
        raise error
    write(*args, **kwargs)


setattr(module, attribute, write_if_room)
