"""Steering inside vLLM: what is patched, and what runs in its processes."""
