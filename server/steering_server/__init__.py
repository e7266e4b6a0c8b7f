"""Steering for vLLM: a plugin, a launcher and the HTTP fields that carry an angle per request."""
