"""MOPOTrainer and its parts."""
