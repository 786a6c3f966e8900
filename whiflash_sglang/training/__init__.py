"""Training of small targets and of both kinds of drafters, on a CPU in an hour or on a GPU in minutes."""
