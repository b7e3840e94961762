"""A codec that turns blocks of channels onto a basis both ends learn."""
