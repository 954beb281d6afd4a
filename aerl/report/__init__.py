"""What a person looks at: the closing table of a run, tables over runs, report.html, the style of figures."""
