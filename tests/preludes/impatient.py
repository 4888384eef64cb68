"""Run the script that the arguments name, with its own arguments, in a process that sleeps a hundredth of the time."""

import runpy
import sys
import time

sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 100)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
