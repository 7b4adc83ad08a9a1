"""Runs that take a minute: the scenarios of the tests at full length, with a table of what clients noticed."""
