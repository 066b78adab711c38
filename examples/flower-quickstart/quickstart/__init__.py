"""Flower's quickstart with one line changed."""
