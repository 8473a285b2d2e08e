"""`scfm bench`: measures scfm itself, so that a number always comes with its device, shapes and commit."""
