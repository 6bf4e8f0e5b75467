"""Makes rows to train on: of source code, documents, tables and conversations."""
