"""One file for each kind of network that an adapter can be trained for."""
