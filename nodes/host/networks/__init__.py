"""The networks that an adapter can be trained for."""
