"""Print by how many MB loading the data has grown this process, and end before anything is tokenized."""

import resource
import sys

import datasets


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def end(*args, **kwargs):
    print("GROWN", round(peak() - before))
    sys.exit()


before = peak()
datasets.DatasetDict.map = end
