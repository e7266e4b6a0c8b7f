"""Hypothesis without a deadline: a test's first torch call takes longer than any sensible one."""

from hypothesis import settings

settings.register_profile("planes", deadline=None)
settings.load_profile("planes")
