"""CT in, masks out. Nothing here knows the network."""
