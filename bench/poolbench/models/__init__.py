"""Pooling in whole models."""
