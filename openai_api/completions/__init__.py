"""Chat and text completions: which may be continued behind a part of their answer, and whole answers from streams."""
