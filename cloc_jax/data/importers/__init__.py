"""Foreign formats → region-text data sets: one file a format, all on engine.py."""
