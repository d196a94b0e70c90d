"""Against mlx-lm."""
