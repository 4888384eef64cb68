"""Begin a process group, as a shell does for each command: a Ctrl-C there goes to data loader workers, too."""

import os

os.setsid()
