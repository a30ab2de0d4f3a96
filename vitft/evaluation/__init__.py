"""Evaluation: the task and its metrics, features, and linear probes."""
