"""What several test modules share: cases, oracles, counters, tolerances."""
