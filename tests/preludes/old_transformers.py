"""Pretend that transformers is older than the script needs."""

import transformers

transformers.utils.__version__ = "5.22.9"
