"""Start the script once for each [flags, folder] of a JSON list, all at the same time; print the list of statuses.

Most of a start is imports, which read the Hub's address from the environment. This process, which no other prelude's
start shares, has done them with its own environment, and forks one process for each start.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest

for name in conftest.PRELOAD:
    importlib.import_module(name)
children = []
for flags, folder in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        conftest.start_here(flags, folder, {}, f"{folder}/run")
        sys.exit(0)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
