"""The configuration: its schema, its targets, the names of runs, and errors in one line."""
