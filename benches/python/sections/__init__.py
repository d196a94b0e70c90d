"""One file per section; each has ``run(report)``."""
