"""Policy training."""
