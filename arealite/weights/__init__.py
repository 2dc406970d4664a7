"""Links that carry weights from the trainer to the servers, and the proof that they arrived."""
