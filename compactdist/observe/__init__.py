"""What a wrapped group can tell about itself: counters, tables, estimates, recordings."""
