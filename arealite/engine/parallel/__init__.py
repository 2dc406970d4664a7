"""The trainer ranks, and how one model is spread over them."""
