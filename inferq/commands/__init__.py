"""One module for each command of ``inferq``."""
