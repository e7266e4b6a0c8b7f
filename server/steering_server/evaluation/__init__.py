"""Measuring what a plane does: metrics of text, and generation with steering outside vLLM."""
