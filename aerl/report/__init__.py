"""What a person looks at: the progress of a run, and its closing table."""
