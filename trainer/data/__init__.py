"""Corpora, tokenizers, and deterministic sampling by global index."""

from trainer.data.dataset import Dataset, open_dataset

__all__ = ["Dataset", "open_dataset"]
