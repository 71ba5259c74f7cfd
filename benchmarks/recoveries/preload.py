# ruff: noqa: F401
"""What the fork server imports once for all its workers."""

import torch.distributed.checkpoint

import trainer.data
import trainer.numeric
import trainer.optim
import trainer.parallel
