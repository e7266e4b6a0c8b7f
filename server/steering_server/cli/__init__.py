"""The command ``steering``."""
