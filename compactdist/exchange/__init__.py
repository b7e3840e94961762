"""Calls become exchanges of frames: planned once for each call site, then replayed by one engine."""
