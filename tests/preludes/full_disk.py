"""Once checkpoint-8 is there the disk is full: `full_disk.py torch.save`, `full_disk.py json.dump`."""

import errno
import json
import os
import sys

import torch

_, function = sys.argv
module, attribute = {"torch.save": (torch, "save"), "json.dump": (json, "dump")}[function]
write = getattr(module, attribute)


def write_if_room(*args, **kwargs):
    if os.path.exists("results_rdrop/checkpoint-8"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write(*args, **kwargs)


setattr(module, attribute, write_if_room)
