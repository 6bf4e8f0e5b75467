"""`merge`: the adapter put into the base model's weights, as they lie on the disk."""
