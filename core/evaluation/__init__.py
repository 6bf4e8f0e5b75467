"""What `evaluate` finds: scores, intervals, files, pictures, screen. How it is found: `core.workflow.evaluate`."""
