"""Accuracy over many batches and processes."""
