"""Logits that are computed only when an operator needs their elements."""
