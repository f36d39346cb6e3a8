"""The operations of the model on packed tokens."""
