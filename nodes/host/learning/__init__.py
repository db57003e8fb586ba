"""Training an adapter on a model of the host."""
