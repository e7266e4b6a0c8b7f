"""Steering over HTTP: what vLLM's app reads, answers and documents of it."""
