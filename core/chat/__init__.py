"""`chat`: the conversation, its commands, its input and its screen; no model."""
