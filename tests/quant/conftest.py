"""bitsandbytes compiles its CPU operators with torch.compile when it can, for many seconds: here it need not."""

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch

torch.set_num_threads(1)  # threads that wait for each other on a busy machine take seconds
