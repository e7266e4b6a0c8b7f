"""Steering over HTTP: vLLM's own routes with typed fields and a response header."""
