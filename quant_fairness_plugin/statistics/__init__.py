"""What the scores of many plans say: rankings, corrections, synergies, standing, dominance. No torch."""
